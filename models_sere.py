"""iBOT (Zhou et al. 2022, arXiv 2111.07832) with self-relations (SERE, Li et al. 2022, arXiv 2206.05184).

The student sees masked global crops and local crops. Its moving average, the teacher, sees the global crops
without masks. Parameter names of the trunk are MAE's; `ibot_head.*` are the prototypes, `sr_*` the relation
heads, and `mask_token` replaces masked patches.

Shapes: B images, G global crops of an image (2), V all of its crops, L patches of a global crop, n of a local
    one,
M patches that may be masked, C channels of a token, K prototypes.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.contract import Entry, Relations, Trunk, option, relation_head
from layers.self_distillation import Centre, ProjectionHead, class_loss, patch_loss, view_cross_entropy
from layers.self_relation import (
    channel_relation,
    edge_points,
    overlap_points,
    sample_tokens,
    spatial_loss,
    valid_mean,
)
from layers.sizes import SIZES, named_sizes
from layers.transformer import gather_tokens
from layers.vit import ViTBackbone

# Share of the smaller crop. Crops that overlap less have no spatial relation in common.
MIN_OVERLAP = 0.05
# Who has prototypes of its own for patches, which else share those of the class tokens: nobody, the student,
# or student and teacher.
PATCH_PROTOTYPES = ("shared", "student", "own")


@dataclass(frozen=True)
class Prototypes:
    """iBOT's projection head.

    Attributes:
        out_dim: number of prototypes K.
        hidden: hidden width of the head's MLP.
        norm_last_layer: fixes the scales of the prototypes at 1 (DINO, appendix C).
        patch_prototypes: one of PATCH_PROTOTYPES.
        patch_out_dim: number of the patches' own prototypes; 0 stands for `out_dim`.
    """

    out_dim: int = 8192
    hidden: int = option("head_hidden", 2048)
    norm_last_layer: bool = True
    patch_prototypes: str = "shared"
    patch_out_dim: int = 0

    def __post_init__(self) -> None:
        if self.patch_prototypes not in PATCH_PROTOTYPES:
            raise ValueError(
                f"`patch_prototypes` takes one of {', '.join(PATCH_PROTOTYPES)}, "
                f"found {self.patch_prototypes!r}"
            )
        if self.patch_prototypes != "own" and self.patch_out_dim not in (0, self.out_dim):
            raise ValueError(
                f"`patch_out_dim` {self.patch_out_dim} differs from `out_dim` {self.out_dim}: patches can "
                "have another number of prototypes only with `patch_prototypes` own"
            )

    def of_patches(self, teacher: bool) -> int:
        """The number of prototypes that are for patches alone, in the teacher's or in the student's head."""
        if self.patch_prototypes == "shared" or (teacher and self.patch_prototypes == "student"):
            return 0
        return self.patch_out_dim or self.out_dim


class SereStudent(ViTBackbone):
    """The trained model; `forward` returns all losses of a batch.

    Local crops have relation heads of their own, since batch statistics differ between resolutions.
    `local_size` is (H, W), any multiple of the patch size, or None without local crops. `points` (rows,
    columns) sample the overlap of two global crops; None for one less than the grid of a global crop.

    `exact` follows the code that SERE published where it differs: initial weights, the points of an overlap,
    pairs of crops without overlap, and the positional embedding of local crops.

    Raises ValueError as `ViTBackbone` does, and if the patches do not fill a local crop.
    """

    # None if the relation is not learned, or if there are no local crops.
    sr_spatial: Any
    sr_spatial_local: Any
    sr_channel: Any
    sr_channel_local: Any

    def __init__(
        self,
        trunk: Trunk,
        prototypes: Prototypes,
        relations: Relations,
        local_size: tuple[int, int] | None = None,
        points: tuple[int, int] | None = None,
        exact: bool = False,
    ):
        super().__init__(trunk)
        self.prototypes = prototypes
        self.relations = relations
        self.exact = exact
        self.local_grid = self._local_grid(local_size)
        # Points of the overlap of two global crops: 13x13 for 14x14 patches, as published. Pairs with a local
        # crop have the points of its own grid.
        self.points = points or (max(1, self.grid[0] - 1), max(1, self.grid[1] - 1))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, trunk.dim))
        self.ibot_head = ProjectionHead(
            trunk.dim,
            prototypes.out_dim,
            prototypes.hidden,
            norm_last_layer=prototypes.norm_last_layer,
            patch_out_dim=prototypes.of_patches(teacher=False),
        )
        local = local_size is not None
        self.sr_spatial = relation_head(relations.spatial, trunk.dim, predictor=True)
        self.sr_spatial_local = relation_head(relations.spatial and local, trunk.dim, predictor=True)
        self.sr_channel = relation_head(relations.channel, trunk.dim, predictor=True)
        self.sr_channel_local = relation_head(relations.channel and local, trunk.dim, predictor=True)
        if exact:
            self._init_as_published()

    def _init_as_published(self) -> None:
        """Draw the weights of the trunk as iBOT does. Heads, mask token and a learned embedding start so
        anyway.
        """
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        # The default of torch's convolutions.
        self.patch_embed.proj.reset_parameters()

    def _local_grid(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        if size is None:
            return None
        if any(side % patch for side, patch in zip(size, self.patch_size)):
            raise ValueError(
                f"`local_size` {size[0]} {size[1]} is not a multiple of the patch size "
                f"{self.patch_size[0]} {self.patch_size[1]}"
            )
        return self.grid_of(size)

    def forward(
        self,
        images: Tensor,
        local: Tensor,
        mask: Tensor,
        masked_ids: Tensor,
        boxes: Tensor,
        targets: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Losses `cls`, `patch`, and with relations `sr_spatial`, `sr_channel`.

        Args:
            images: (B, G, c, H, W) global crops.
            local: (B, V-G, c, h, w) local crops.
            mask: (B, G, L), true = replaced by the mask token.
            masked_ids: (B*G, M) cells that contain all masked ones.
            boxes: (B, V, 5) of the crops, as in `layers.self_relation`.
            targets: the output of `SereTeacher` for the same batch.
        """
        B, G = images.shape[:2]
        flat_mask = mask.flatten(0, 1)  # (B*G, L)
        tokens = self.forward_tokens(images.flatten(0, 1), flat_mask, self.mask_token)  # (B*G, 1+L, C)
        normed = self.norm(tokens)
        cls = normed[:, 0].unflatten(0, (B, G))  # (B, G, C)
        local_patches = None
        if local.shape[1]:
            local_tokens = self.forward_tokens(local.flatten(0, 1))  # (B*(V-G), 1+n, C)
            local_cls = self.norm(local_tokens[:, 0]).unflatten(0, (B, -1))  # (B, V-G, C)
            cls = torch.cat([cls, local_cls], 1)  # (B, V, C)
            local_patches = local_tokens[:, 1:]  # (B*(V-G), n, C)
        patches = gather_tokens(normed[:, 1:], masked_ids)  # (B*G, M, C)
        masked = flat_mask.gather(1, masked_ids)  # (B*G, M)
        losses = {
            "cls": class_loss(self.ibot_head(cls), targets["cls"]),
            "patch": patch_loss(self.ibot_head(patches, patches=True), targets["patch"], masked),
        }
        tokens = tokens[:, 1:]  # (B*G, L, C)
        if self.sr_spatial is not None:
            losses["sr_spatial"] = self.spatial(tokens, local_patches, boxes, targets["spatial"])
        if self.sr_channel is not None:
            losses["sr_channel"] = self.channel(tokens, local_patches, targets["channel"])
        return losses

    def spatial(self, tokens: Tensor, local_tokens: Tensor | None, boxes: Tensor, teacher: Tensor) -> Tensor:
        """Spatial relations: every global crop against the other one, every local crop against both.

        Patch tokens before the final norm (B*G, L, C) and (B*(V-G), n, C); teacher (B*G, L, C).
        """
        B = len(boxes)
        # Global crops of an image.
        G = 2
        own = boxes[:, :G]  # (B, G, 5)
        at, at_other, counts = self._common_points(own, own.flip(1), self.points)  # (B, G, S, 2)
        s = self._sample(self.sr_spatial(tokens), self.grid, at.flatten(0, 1))  # (B*G, S, C)
        other = teacher.unflatten(0, (B, G)).flip(1).flatten(0, 1)  # (B*G, L, C)
        t = self._sample(other, self.grid, at_other.flatten(0, 1))  # (B*G, S, C)
        losses = [self._spatial_loss(s, t)]  # (B*G,)
        valid = [counts.flatten()]
        if local_tokens is not None and self.local_grid is not None:
            # A map is sampled once for all of its partners, so no map is copied.
            at, at_global, counts = self._common_points(
                boxes[:, G:, None], own[:, None], self.local_grid
            )  # (B, V-G, G, S, 2)
            points = at.flatten(0, 1).flatten(1, 2)  # (B*(V-G), G*S, 2)
            s = self._sample(self.sr_spatial_local(local_tokens), self.local_grid, points)
            points = at_global.transpose(1, 2).flatten(0, 1).flatten(1, 2)  # (B*G, (V-G)*S, 2)
            t = self._sample(teacher, self.grid, points)
            S = at.shape[3]
            C = s.shape[2]
            s = s.reshape(-1, S, C)  # (B*(V-G)*G, S, C)
            t = t.view(B, G, -1, S, C).transpose(1, 2).flatten(0, 2)  # (B*(V-G)*G, S, C)
            losses.append(self._spatial_loss(s, t))
            valid.append(counts.flatten())
        return valid_mean(torch.cat(losses), torch.cat(valid))

    def _common_points(self, a: Tensor, b: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Points (..., S, 2) of an overlap, in each of two crops, and whether the pair counts (...)."""
        if self.exact:
            # Crops without overlap have uniform relations, and add a constant to the published loss.
            at, at_other, share = edge_points(a, b, size)
            return at, at_other, torch.ones_like(share, dtype=torch.bool)
        at, at_other, share = overlap_points(a, b, size)
        return at, at_other, share > MIN_OVERLAP

    def _sample(self, tokens: Tensor, grid: tuple[int, int], points: Tensor) -> Tensor:
        """Interpolate tokens (b, L, C) at points (b, S, 2) -> (b, S, C)."""
        outside = "border"
        if self.exact:
            outside = "zeros"
        return sample_tokens(tokens, grid, points, outside)

    def _spatial_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Cross-entropy of the relations of (b, S, C) each -> (b,)."""
        return spatial_loss(student, teacher, self.trunk.num_heads, self.relations.temp_spatial)

    def channel(self, tokens: Tensor, local_tokens: Tensor | None, teacher: Tensor) -> Tensor:
        """Channel relations of the same pairs. They are (C, C) for any crop and need no alignment."""
        relations = channel_relation(self.sr_channel(tokens)).unflatten(0, (-1, 2))  # (B, G, C, C)
        if local_tokens is not None:
            small = channel_relation(self.sr_channel_local(local_tokens)).unflatten(0, (len(relations), -1))
            relations = torch.cat([relations, small], 1)  # (B, V, C, C)
        logits = channel_relation(teacher) / self.relations.temp_channel  # (B*G, C, C)
        return view_cross_entropy(relations, logits.softmax(-1).unflatten(0, (-1, 2)))

    def resized_pos_embed(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        """The positional embedding (1, 1 + L, C), resized to a `grid` as `ViTBackbone` or as DINO does."""
        if not self.exact or grid == self.grid:
            return super().resized_pos_embed(table, grid)
        cells = table[:, self.num_prefix :].unflatten(1, self.grid).permute(0, 3, 1, 2)  # (1, C, h, w)
        # DINO (Apache-2.0) adds 0.1 against rounding, and so stretches the table a little: positions
        # follow the factor.
        factors = [(new + 0.1) / old for new, old in zip(grid, self.grid)]
        cells = F.interpolate(cells.float(), scale_factor=factors, mode="bicubic")
        return torch.cat([table[:, : self.num_prefix], cells.flatten(2).transpose(1, 2).to(table.dtype)], 1)

    def no_weight_decay(self) -> set[str]:
        """The trunk's list and the mask token."""
        return super().no_weight_decay() | {"mask_token"}

    def published_groups(self, weight_decay: float) -> list[dict]:
        """Return groups for AdamW as the published code has them: only the weights of norms are not decayed.

        iBOT itself does not decay biases. The scales of the prototypes are matrices of one column there.
        """
        groups: list[dict] = [
            {"params": [], "weight_decay": decay, "lr_scale": 1.0} for decay in (0.0, weight_decay)
        ]
        for name, p in self.named_parameters():
            if p.requires_grad:
                decayed = p.ndim > 1 or name.endswith((".bias", "scale"))
                groups[decayed]["params"].append(p)
        return groups


class SereTeacher(ViTBackbone):
    """The moving average of a student: its trunk, prototypes, and relation heads without predictor."""

    def __init__(self, student: SereStudent):
        super().__init__(dataclasses.replace(student.trunk, drop_path=0.0))
        prototypes = student.prototypes
        self.ibot_head = ProjectionHead(
            student.dim,
            prototypes.out_dim,
            prototypes.hidden,
            patch_out_dim=prototypes.of_patches(teacher=True),
        )
        self.sr_spatial = relation_head(student.relations.spatial, student.dim, predictor=False)
        self.sr_channel = relation_head(student.relations.channel, student.dim, predictor=False)

    @torch.no_grad()
    def forward(
        self,
        images: Tensor,
        masked_ids: Tensor,
        centres: Any,
        temperature: float,
        patch_temperature: float | None = None,
    ) -> dict[str, Tensor]:
        """Global crops (B, G, c, H, W) -> the student's targets; updates the centres.

        `patch_temperature` sharpens the targets of patches, `temperature` those of class tokens, and of both
        without the other.

        `cls` (B, G, K) and `patch` (B*G, M, K) are distributions; `spatial` and `channel` are the tokens
        (B*G, L, C) that form the relations.
        """
        tokens = self.forward_tokens(images.flatten(0, 1))  # (B*G, 1+L, C)
        normed = self.norm(tokens)
        cls = self.ibot_head(normed[:, 0])  # (B*G, K)
        unit = self.ibot_head.project(normed[:, 1:])  # (B*G, L, bottleneck)
        patch = self.ibot_head.logits(gather_tokens(unit, masked_ids), patches=True)  # (B*G, M, K)
        if patch_temperature is None:
            patch_temperature = temperature
        targets = {
            "cls": centres["cls"].target(cls, temperature).unflatten(0, images.shape[:2]),
            "patch": centres["patch"].target(patch, patch_temperature),
        }
        centres["cls"].update(cls.mean(0))
        # The centre is over all patches, although logits are computed only for those that may be masked.
        centres["patch"].update(self.ibot_head.logits(unit.flatten(0, 1).mean(0), patches=True))
        for name, head in (("spatial", self.sr_spatial), ("channel", self.sr_channel)):
            if head is not None:
                targets[name] = head(tokens[:, 1:])
        return targets


def make_centres(out_dim: int, patch_out_dim: int = 0, once_per_step: bool = False) -> nn.ModuleDict:
    """The running means of the teacher's logits: `cls` (out_dim,) and `patch` (patch_out_dim,).

    `patch_out_dim` 0 stands for `out_dim`. See `Centre` for `once_per_step`.
    """
    return nn.ModuleDict(
        {
            "cls": Centre(out_dim, once_per_step=once_per_step),
            "patch": Centre(patch_out_dim or out_dim, once_per_step=once_per_step),
        }
    )


SERE = Entry(
    SereStudent,
    {
        "trunk": Trunk(dim=384, num_heads=6, pos_embed="learned", drop_path=0.1),
        "prototypes": Prototypes(),
        "relations": Relations(spatial=True, channel=True),
        "local_size": (96, 96),
        "points": None,
        "exact": False,
    },
)
# Hidden width of the projection head; iBOT's from tiny on. On CPUs iBOT's head would be most of the work.
_HIDDEN = {"pico": 256, "nano": 512}

MODELS: dict[str, Entry[SereStudent]] = {
    f"sere_vit_{size}_patch{patch}": SERE.override(
        **SIZES[size], patch_size=(patch, patch), head_hidden=_HIDDEN.get(size, 2048)
    )
    for size, patch in named_sizes()
    if size != "huge"
}
