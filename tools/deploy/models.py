"""The models that whole programs are made of: a classifier of any backbone, or a plain ViT's encoder."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from backbones.heads import head_options, resolve_head
from backbones.registry import MODELS, build_classifier, norm_options, trained_options
from layers.classifier import Classifier
from layers.contract import Backbone
from models_mae_pl import MaskedAutoencoderViT
from models_vit import VisionTransformer
from tools import stored_model
from tools.formats import DECODER, Model, load_any, readable
from util.flags.groups import pair
from util.weights import checkpoint as files
from util.weights import transfer
from util.weights.defaults import known_flags
from util.weights.types import Checkpoint


def encoder_of(checkpoint: Checkpoint, source: Model) -> Checkpoint:
    """Return the encoder alone, and turn `source` into its model.

    The norm after the mean becomes the norm of each token.
    """
    weights = {
        k.replace("fc_norm.", "norm."): v
        for k, v in checkpoint.model.items()
        if not k.startswith((*DECODER, "head."))
    }
    if not isinstance(source, MaskedAutoencoderViT):
        source.num_classes = 0
        if source.fc_norm is not None:
            source.norm = source.fc_norm
    return Checkpoint(checkpoint.path, weights, checkpoint.args)


class Program(nn.Module):
    """A model as a function of images with named outputs.

    Images (B, in_chans, H, W), normalised -> `logits` (B, K) of a classifier. Of an encoder `cls` (B, C), the
    class token, and `patches` (B, L, C), row by row, both after the final norm.
    """

    def __init__(self, model: Backbone):
        super().__init__()
        self.model = model
        self.outputs: tuple[str, ...] = ("cls", "patches")
        if isinstance(model, Classifier) and model.num_classes:
            self.outputs = ("logits",)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, in_chans, H, W) -> the outputs by name."""
        if self.outputs == ("logits",):
            return {"logits": self.model(images)}
        tokens = self.model.forward_features(images)  # (B, 1 + L, C)
        return {"cls": tokens[:, 0], "patches": tokens[:, self.model.num_prefix :]}


def program_of(path: str) -> tuple[Program, Checkpoint]:
    """The program of a checkpoint, in evaluation mode, and the checkpoint without label heads and decoder.

    Raises ValueError for files that hold neither a plain Vision Transformer nor a classifier of this toolkit.
    """
    checkpoint = load_any(path)
    checkpoint.drop_optimizer()
    model: Backbone
    if checkpoint.kind == "classifier" and not stored_model.is_plain(checkpoint):
        model = registered_classifier(checkpoint)
    elif checkpoint.kind == "classifier" and "dist_token" in checkpoint.model:
        model = stored_model.model_of(checkpoint)
    else:
        checkpoint = readable(checkpoint)
        source = stored_model.model_of(checkpoint)
        model = source
        if not isinstance(source, VisionTransformer) or not source.num_classes:
            # The size of the images does not follow from an encoder's weights alone.
            checkpoint.args["input_size"] = list(source.img_size)
            if isinstance(source, MaskedAutoencoderViT):
                checkpoint.args["num_heads"] = source.trunk.num_heads
            model = stored_model.model_of(encoder_of(checkpoint, source))
    if isinstance(model, Classifier):
        # Training alone needs the label heads.
        model.pos_head = None
    return Program(model.float().eval().requires_grad_(False)), checkpoint


def registered_classifier(saved: Checkpoint) -> Classifier:
    """The classifier of a checkpoint with its weights, by the name of the model that the file stores.

    Raises ValueError if the file does not store it, and if the weights do not fit.
    """
    known = known_flags(saved, list(MODELS))
    name = known.get("model")
    if name is None:
        raise ValueError(
            f"{saved.path} is no plain Vision Transformer and does not store the name of its model: use a "
            "checkpoint of this toolkit"
        )
    options: dict[str, Any] = trained_options(saved.args) | norm_options(name, saved.args)
    options |= head_options(name, resolve_head({}, name, saved))
    if known.get("input_size"):
        options["img_size"] = pair(known["input_size"], "input_size")
    if known.get("in_chans"):
        options["in_chans"] = known["in_chans"]
    with torch.random.fork_rng(devices=[]):
        model = build_classifier(name, num_classes=_num_classes(saved), **options)
    fitted, _ = transfer.fit_for_evaluation(model, saved)
    files.load_for_evaluation(model, fitted)
    return model


def _num_classes(saved: Checkpoint) -> int:
    """Outputs of the class head, linear or second-order."""
    return next(len(w) for k, w in saved.model.items() if re.match(r"head\.(fc\.|fc_visual\.)?weight$", k))
