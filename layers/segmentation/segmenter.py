"""A backbone with a head for segmentation, as it is fine-tuned.

Shapes: B batch, C channels of a token, K classes, (h, w) the grid of patch tokens.
"""

from collections.abc import Callable

from torch import Tensor, nn

from layers.classifier import Classifier
from layers.segmentation.features import even_blocks, patch_maps
from layers.segmentation.heads import DPTHead, LinearHead, UPerNetHead

HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": LinearHead,
    "upernet": UPerNetHead,
    "dpt": DPTHead,
}
KINDS = tuple(HEADS)


class Segmenter(nn.Module):
    """Images (B, in_chans, H, W) -> logits (B, K, ., .): a backbone, and a head on maps of its patch tokens.

    The head `linear` reads the last layer and gives logits on the grid of patches. `upernet` and `dpt` read
    four evenly spaced blocks and give logits on a grid that is 4 or 8 times as fine. Parameters of the
    backbone keep their names after `backbone.`; those of the head are `segment_head.*`. The backbone loses
    its own class head.

    The linear head has a norm of its own. A backbone with a norm after its average, as MAE fine-tunes it,
    hands that norm over: its tokens would else be normalised twice. All other backbones keep their final
    norm, and the head's comes after it.

    Raises ValueError if the head is unknown, if it needs blocks that the backbone does not have, and if it
    needs a package that is not installed.
    """

    def __init__(self, backbone: Classifier, classes: int, kind: str = "linear"):
        super().__init__()
        if kind not in HEADS:
            raise ValueError(f"the head is one of {', '.join(HEADS)}, found {kind!r}")
        self.kind = kind
        self.num_classes = classes
        self.blocks = None
        if kind != "linear":
            self.blocks = even_blocks(backbone)
        self.backbone = backbone
        for name in ("head", "head_dist"):
            if hasattr(backbone, name):
                setattr(backbone, name, nn.Identity())
        self.segment_head = HEADS[kind](backbone.dim, classes)
        if kind == "linear" and backbone.fc_norm is not None:
            self.segment_head.norm = backbone.fc_norm
            backbone.fc_norm = None

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) of any size that the backbone takes -> logits (B, K, ., .)."""
        maps = patch_maps(self.backbone, images, self.blocks)
        if self.blocks is None:
            return self.segment_head(maps)
        return self.segment_head(maps.chunk(len(self.blocks), dim=1))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed, in addition to all one-dimensional ones."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    @property
    def num_layers(self) -> int:
        """The largest `layer_id`."""
        return self.backbone.num_layers

    def layer_id(self, name: str) -> int:
        """Depth of a parameter for layer-wise learning rates; the head has the largest one."""
        own = name.removeprefix("backbone.")
        if own == name:
            return self.num_layers
        return self.backbone.layer_id(own)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Run each block of the backbone again in backward instead of keeping its inner tensors."""
        self.backbone.set_grad_checkpointing(enable)
