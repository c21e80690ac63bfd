"""iBOT (Zhou et al. 2022, arXiv 2111.07832) with self-relations (SERE, Li et al. 2022, arXiv 2206.05184).

A student sees masked global crops and local crops, its moving average the unmasked global ones. Parameter names of the
trunk are MAE's; `ibot_head.*` are the prototypes, `sr_*` the relation heads, `mask_token` what replaces masked patches.

Shapes: B images, G global crops of an image (2), V all of its crops, L patches of a global crop, n of a local one,
M patches that may be masked, C channels of a token, K prototypes.
"""

from functools import partial

import torch
from torch import Tensor, nn

from layers.self_distillation import Centre, ProjectionHead, class_loss, patch_loss, view_cross_entropy
from layers.self_relation import (
    RelationHead,
    channel_relation,
    overlap_points,
    sample_tokens,
    spatial_loss,
    valid_mean,
)
from layers.transformer import gather_tokens
from layers.vit import ViTBackbone

MIN_OVERLAP = 0.05  # of the smaller crop: pairs of crops that share less have no spatial relation in common


class SereStudent(ViTBackbone):
    """The trained model; `forward` gives all losses of a batch.

    `sr_spatial` and `sr_channel` say which relations are learned; local crops have heads of their own, since batch
    statistics differ between resolutions. `local_size` (H, W) may be any multiple of the patch; None: no local crops.
    Raises ValueError on sizes that do not fit.
    """

    def __init__(
        self,
        img_size: tuple[int, int] = (224, 224),
        patch_size: tuple[int, int] = (16, 16),
        in_chans: int = 3,
        *,
        local_size: tuple[int, int] | None = (96, 96),
        dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        pos_embed: str = "learned",
        drop_path: float = 0.1,
        out_dim: int = 8192,
        head_hidden: int = 2048,
        norm_last_layer: bool = True,
        sr_spatial: bool = True,
        sr_channel: bool = True,
        sr_temp_spatial: float = 0.5,
        sr_temp_channel: float = 0.1,
    ):
        super().__init__(
            img_size, patch_size, in_chans, dim, depth, num_heads, mlp_ratio, pos_embed, drop_path
        )
        if local_size and any(side % patch for side, patch in zip(local_size, patch_size)):
            raise ValueError(
                f"--local_size {local_size[0]} {local_size[1]} is no multiple of the patch size "
                f"{patch_size[0]} {patch_size[1]}"
            )
        self.local_grid = self.grid_of(local_size) if local_size else None
        # Points of the overlap of two global crops: 13x13 for 14x14 patches, as published. Local crops: their own grid.
        self.points = max(1, self.grid[0] - 1), max(1, self.grid[1] - 1)
        self.temp_spatial, self.temp_channel, self.num_heads = sr_temp_spatial, sr_temp_channel, num_heads
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.ibot_head = ProjectionHead(dim, out_dim, head_hidden, norm_last_layer=norm_last_layer)
        for name, wanted in (("sr_spatial", sr_spatial), ("sr_channel", sr_channel)):
            setattr(self, name, RelationHead(dim, predictor=True) if wanted else None)
            setattr(
                self, f"{name}_local", RelationHead(dim, predictor=True) if wanted and local_size else None
            )

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

        images (B, G, c, H, W) and local (B, V-G, c, h, w) crops, boxes (B, V, 5) as in `layers.self_relation`; mask
        (B, G, L), true = replaced by the mask token; masked_ids (B*G, M), cells with all masked ones among them;
        `targets` is what `SereTeacher` gives for the same batch.
        """
        B, G = images.shape[:2]
        tokens = self.forward_tokens(
            images.flatten(0, 1), mask.flatten(0, 1), self.mask_token
        )  # (B*G, 1+L, C)
        normed = self.norm(tokens)
        cls = normed[:, 0].unflatten(0, (B, G))
        local_tokens = None
        if local.shape[1]:
            local_tokens = self.forward_tokens(local.flatten(0, 1))  # (B*(V-G), 1+n, C)
            cls = torch.cat([cls, self.norm(local_tokens[:, 0]).unflatten(0, (B, -1))], 1)  # (B, V, C)
        patches = gather_tokens(normed[:, 1:], masked_ids)  # (B*G, M, C)
        losses = {
            "cls": class_loss(self.ibot_head(cls), targets["cls"]),
            "patch": patch_loss(
                self.ibot_head(patches), targets["patch"], mask.flatten(0, 1).gather(1, masked_ids)
            ),
        }
        tokens, local_tokens = tokens[:, 1:], None if local_tokens is None else local_tokens[:, 1:]
        if self.sr_spatial is not None:
            losses["sr_spatial"] = self.spatial(tokens, local_tokens, boxes, targets["spatial"])
        if self.sr_channel is not None:
            losses["sr_channel"] = self.channel(tokens, local_tokens, targets["channel"])
        return losses

    def spatial(self, tokens: Tensor, local_tokens: Tensor | None, boxes: Tensor, teacher: Tensor) -> Tensor:
        """Spatial relations: every global crop against the other one, every local crop against both.

        Patch tokens before the final norm (B*G, L, C) and (B*(V-G), n, C); teacher (B*G, L, C).
        """
        B, G = len(boxes), 2
        own = boxes[:, :G]
        at, at_other, share = overlap_points(own, own.flip(1), self.points)  # (B, G, S, 2)
        s = sample_tokens(self.sr_spatial(tokens), self.grid, at.flatten(0, 1))
        t = sample_tokens(
            teacher.unflatten(0, (B, G)).flip(1).flatten(0, 1), self.grid, at_other.flatten(0, 1)
        )
        losses = [spatial_loss(s, t, self.num_heads, self.temp_spatial)]  # (B*G,)
        shares = [share.flatten()]
        if local_tokens is not None:
            # A map is sampled once for all of its partners: no map is copied.
            at, at_global, share = overlap_points(
                boxes[:, G:, None], own[:, None], self.local_grid
            )  # (B, V-G, G, S, 2)
            s = sample_tokens(
                self.sr_spatial_local(local_tokens), self.local_grid, at.flatten(0, 1).flatten(1, 2)
            )
            t = sample_tokens(teacher, self.grid, at_global.transpose(1, 2).flatten(0, 1).flatten(1, 2))
            S, C = at.shape[3], s.shape[2]
            s = s.reshape(-1, S, C)  # (B*(V-G)*G, S, C)
            t = t.view(B, G, -1, S, C).transpose(1, 2).flatten(0, 2)
            losses.append(spatial_loss(s, t, self.num_heads, self.temp_spatial))
            shares.append(share.flatten())
        return valid_mean(torch.cat(losses), torch.cat(shares) > MIN_OVERLAP)

    def channel(self, tokens: Tensor, local_tokens: Tensor | None, teacher: Tensor) -> Tensor:
        """Channel relations of the same pairs; these are (C, C) for any crop and need no alignment."""
        relations = channel_relation(self.sr_channel(tokens)).unflatten(0, (-1, 2))  # (B, G, C, C)
        if local_tokens is not None:
            small = channel_relation(self.sr_channel_local(local_tokens)).unflatten(0, (len(relations), -1))
            relations = torch.cat([relations, small], 1)  # (B, V, C, C)
        target = (channel_relation(teacher) / self.temp_channel).softmax(-1).unflatten(0, (-1, 2))
        return view_cross_entropy(relations, target)

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"mask_token"}


class SereTeacher(ViTBackbone):
    """The part of a student that its moving average needs: trunk, prototypes, relation heads without predictor."""

    def __init__(self, student: SereStudent):
        block = student.blocks[0]
        super().__init__(
            student.img_size,
            student.patch_size,
            student.in_chans,
            student.dim,
            len(student.blocks),
            student.num_heads,
            block.mlp.fc1.out_features / student.dim,
            student.pos_embed_kind,
        )
        head = student.ibot_head
        self.ibot_head = ProjectionHead(student.dim, len(head.prototypes), head.mlp[0].out_features)
        self.sr_spatial = (
            RelationHead(student.dim, predictor=False) if student.sr_spatial is not None else None
        )
        self.sr_channel = (
            RelationHead(student.dim, predictor=False) if student.sr_channel is not None else None
        )

    @torch.no_grad()
    def forward(
        self, images: Tensor, masked_ids: Tensor, centres: nn.ModuleDict, temperature: float
    ) -> dict[str, Tensor]:
        """Global crops (B, G, c, H, W) -> what the student learns of them; moves the centres.

        `cls` (B, G, K) and `patch` (B*G, M, K) are distributions; `spatial` and `channel` are tokens (B*G, L, C) of which
        relations are formed.
        """
        tokens = self.forward_tokens(images.flatten(0, 1))  # (B*G, 1+L, C)
        normed = self.norm(tokens)
        cls = self.ibot_head(normed[:, 0])  # (B*G, K)
        unit = self.ibot_head.project(normed[:, 1:])  # (B*G, L, bottleneck)
        patch = self.ibot_head.logits(gather_tokens(unit, masked_ids))  # (B*G, M, K)
        targets = {
            "cls": centres["cls"].target(cls, temperature).unflatten(0, images.shape[:2]),
            "patch": centres["patch"].target(patch, temperature),
        }
        centres["cls"].update(cls.mean(0))
        # Over all patches, though logits are made of those that may be masked only.
        centres["patch"].update(self.ibot_head.logits(unit.flatten(0, 1).mean(0)))
        for name, head in (("spatial", self.sr_spatial), ("channel", self.sr_channel)):
            if head is not None:
                targets[name] = head(tokens[:, 1:])
        return targets


def make_centres(out_dim: int) -> nn.ModuleDict:
    return nn.ModuleDict({"cls": Centre(out_dim), "patch": Centre(out_dim)})


# Width, depth, heads as in models_vit, and the hidden width of the projection head, iBOT's from tiny on. Pico and
# nano are for CPUs, where iBOT's head would be most of the work; small patches are for small images.
_SIZES = {
    "pico": (96, 4, 3, 256),
    "nano": (128, 6, 4, 512),
    "tiny": (192, 12, 3, 2048),
    "small": (384, 12, 6, 2048),
    "base": (768, 12, 12, 2048),
    "large": (1024, 24, 16, 2048),
}
_PATCHES = {
    "pico": (8, 4),
    "nano": (8, 4),
    "tiny": (16, 8, 4),
    "small": (16, 8, 4),
    "base": (16, 8, 4),
    "large": (16,),
}


def _sere(size: str, patch: int, **kwargs) -> SereStudent:
    named = dict(zip(("dim", "depth", "num_heads", "head_hidden"), _SIZES[size])) | {
        "patch_size": (patch, patch)
    }
    return SereStudent(**named | kwargs)


# name -> builder; keyword arguments of SereStudent override what the name says.
MODELS = {
    f"sere_vit_{size}_patch{patch}": partial(_sere, size, patch)
    for size, patches in _PATCHES.items()
    for patch in patches
}
