"""Patch tokens of any backbone, layer by layer, and the images that they are computed from.

Legend: B batch, L cells of the grid, row by row, C channels of a token.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from backbones.registry import MODELS, build_classifier, find, norm_options, trained_options
from layers.classifier import Classifier
from layers.contract import Backbone
from tools import stored_model
from tools.draw import USUAL, Display, Images, open_images
from util.data.datasets import ImageDataset
from util.data.loading.loader import collate
from util.data.pixels import Pixels
from util.data.timm_datasets import TimmDataset
from util.files.names import counted, printable
from util.flags.groups import pair
from util.weights import checkpoint, transfer
from util.weights.defaults import known_flags
from util.weights.types import Checkpoint

# Images that go through the model at once. The tokens of all layers of a ViT-L take 20 MB an image.
BATCH = 16


def load_backbone(path: str) -> tuple[Backbone, dict]:
    """`backbone_of`, with the model on the GPU if there is one."""
    model, flags = backbone_of(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device), flags


def backbone_of(path: str) -> tuple[Backbone, dict]:
    """The frozen backbone of a checkpoint in evaluation mode, and the flags stored with it.

    A plain Vision Transformer is built from its weights, every other model by the name that the file stores.
    timm/NAME stands for the weights that timm publishes. Raises ValueError if the file does not tell its
    model, and if its weights do not fit.
    """
    if path.startswith("timm/") and not os.path.exists(path):
        # timm takes seconds to import.
        from backbones.timm import published_checkpoint

        saved = published_checkpoint(path)
        saved.args["model"] = path
    else:
        saved = checkpoint.load(path)
    saved.drop_optimizer()
    model: Backbone
    if is_plain_vit(saved):
        model = stored_model.model_of(saved)
    else:
        model = _registered(saved)
    return model.eval().requires_grad_(False), saved.args


def is_plain_vit(saved: Checkpoint) -> bool:
    """Whether a checkpoint's weights determine its model; see `tools.stored_model`."""
    return saved.kind in ("pretraining", "classifier", "encoder") and stored_model.is_plain(saved)


def stored_name(saved: Checkpoint) -> str:
    """The name of a checkpoint's model. Raises ValueError if the file does not store it."""
    name = known_flags(saved, list(MODELS)).get("model")
    if name is None:
        raise ValueError(
            f"{printable(saved.path)} is no plain Vision Transformer and does not store the name of its "
            "model: use a checkpoint of this toolkit, or timm/NAME"
        )
    return name


def _registered(saved: Checkpoint) -> Classifier:
    """The classifier that has a checkpoint's encoder, by the name of the model that the file stores."""
    name = stored_name(saved)
    known = known_flags(saved, list(MODELS))
    options: dict[str, Any] = {"num_classes": 0}
    if known.get("input_size"):
        options["img_size"] = pair(known["input_size"], "input_size")
    if known.get("in_chans"):
        options["in_chans"] = known["in_chans"]
    if find(name).own_positions:
        options |= trained_options(saved.args)
    else:
        options |= {"pos_embed": "none", "pool": "cls"} | norm_options(name, saved.args)
        if "pos_embed" in saved.encoder_weights():
            options["pos_embed"] = "learned"
        if known.get("patch_size"):
            options["patch_size"] = pair(known["patch_size"], "patch_size")
        if saved.args.get("patch_embed"):
            options["patch_embed"] = saved.args["patch_embed"]
    model = build_classifier(name, **options)
    print(f"{printable(saved.path)}: {transfer.init_encoder(model, saved, 'zero')}")
    return model


@torch.no_grad()
def layer_tokens(model: Backbone, images: Tensor) -> list[Tensor]:
    """Patch tokens (B, L, C), float32, of each layer for normalised images, all patches visible.

    Layer 0 is the embedded patches with the positional embedding, if there is one; layer i is the output of
    block i. Of backbones without a sequence of blocks on such tokens, such as Swin and convolutional ones,
    there is one layer: the last one, after the final norm. Each token is normalised by a LayerNorm without
    parameters: blocks, heads and probes read the residual stream through such a norm, and layers of different
    scale become comparable. The class token and other prefix tokens are left out.
    """
    tokens, layers = _blocks_outputs(model, images)
    expected = len(images), model.num_prefix + model.grid[0] * model.grid[1]
    if not layers or any(not torch.is_tensor(x) or x.ndim != 3 or x.shape[:2] != expected for x in layers):
        if isinstance(model, Classifier):
            return [_normed(model.label_tokens(tokens))]
        return [_normed(tokens[:, model.num_prefix :])]
    return [_normed(x[:, model.num_prefix :]) for x in layers]


def _normed(tokens: Tensor) -> Tensor:
    return F.layer_norm(tokens.float(), tokens.shape[-1:])


def _blocks_outputs(model: Backbone, images: Tensor) -> tuple[Tensor, list[Any]]:
    """The model's last tokens, the input of the first block, and the outputs of all blocks."""
    # timm's model is within ours.
    blocks = getattr(getattr(model, "backbone", model), "blocks", None)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential) or not len(blocks):
        return model.forward_features(images), []
    layers: list[Any] = []
    hooks = [blocks[0].register_forward_pre_hook(lambda block, given: layers.extend(given[:1]))]
    hooks += [block.register_forward_hook(lambda block, given, out: layers.append(out)) for block in blocks]
    try:
        tokens = model.forward_features(images)
    finally:
        for hook in hooks:
            hook.remove()
    if len(layers) != 1 + len(blocks):
        return tokens, []
    return tokens, layers


def last_tokens(model: Backbone, images: Tensor) -> Tensor:
    """The last layer of `layer_tokens`, (B, L, C)."""
    return layer_tokens(model, images)[-1]


def layer_numbers(model: Backbone, count: int) -> list[int]:
    """The numbers of `count` layers of `layer_tokens`: 0 for the embedding; that of the last one if alone."""
    if count > 1:
        return list(range(count))
    # The largest number is that of the heads.
    return [max(1, model.num_layers - 1)]


@dataclass
class ImageStream:
    """Up to `count` images spread over a data set, which are read anew in each pass.

    Attributes:
        bad: numbers of images that cannot be read; they are left out.
    """

    dataset: ImageDataset | TimmDataset
    pixels: Pixels
    count: int
    device: torch.device
    bad: set[int] = field(default_factory=set)

    @classmethod
    def open(
        cls, model: Backbone, flags: dict, data_path: Images, count: int, display: Display = USUAL
    ) -> "ImageStream":
        """The images for a model, as `tools.draw.load_images` reads them."""
        dataset, pixels = open_images(model, flags, data_path, display)
        device = next(model.parameters()).device
        return cls(dataset, pixels, min(count, len(dataset)), device)

    def batches(self, wanted: Callable[[int], bool] = lambda number: True) -> Iterator[Tensor]:
        """Normalised images (B, C, H, W) on the device, of the numbers, from 0, that are wanted."""
        return (images for _, images in self.numbered(wanted))

    def numbered(
        self, wanted: Callable[[int], bool] = lambda number: True
    ) -> Iterator[tuple[list[int], Tensor]]:
        """The batches with the numbers of their images."""
        samples = self._samples(wanted)
        while batch := list(islice(samples, BATCH)):
            images = collate([sample for _, sample in batch])["image"]
            yield [number for number, _ in batch], self.pixels.normalize(images.to(self.device))

    def _samples(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, dict]]:
        for number, sample in self._all(wanted):
            if sample["bad"]:
                self.bad.add(number)
            elif wanted(number):
                yield number, sample

    def _all(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, dict]]:
        # A stream cannot be asked for a sample by its number.
        if isinstance(self.dataset, IterableDataset):
            yield from enumerate(islice(self.dataset, self.count))
            return
        for number in range(self.count):
            if wanted(number):
                yield number, self.dataset[number * len(self.dataset) // self.count]

    def note(self) -> str:
        """A line about images that were left out; '' if there are none."""
        if not self.bad:
            return ""
        return f"left out {counted(len(self.bad), 'image')} that cannot be read"
