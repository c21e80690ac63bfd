"""All classifiers by name: ours, and every timm backbone as timm/NAME."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

import models_vit
from backbones import so_vit, swin
from layers.classifier import Classifier
from layers.contract import Entry
from util.data.sources.image_index import some_names
from util.flags.early import check_model
from util.flags.groups import pair
from util.weights.architecture import whole_numbers
from util.weights.types import EPS_FLAG, Checkpoint
from util.weights.validate import MOST_PIXELS, shown

MODELS: dict[str, Entry[Classifier]] = models_vit.MODELS | swin.MODELS | so_vit.MODELS


def find(name: str) -> Entry[Classifier]:
    """The entry of a classifier, also of timm/NAME; raises ValueError if there is no model of that name."""
    if name.startswith("timm/"):
        # timm takes seconds to import.
        from backbones.timm import timm_entry

        return timm_entry(name)
    check_model("main_finetune", name, list(MODELS))
    return MODELS[name]


def build_classifier(name: str, **options: Any) -> Classifier:
    """Build a classifier by its name; `options` are those of its entry.

    Raises ValueError as `find` does, if the model does not take an option, and as the model itself does.
    """
    return find(name)(**options)


def known_classes(saved: Checkpoint, data: list[str], given: list[str] | None = None) -> list[str]:
    """Class names of a stored classifier in the order of its outputs, for data with the classes `data`.

    They are the `given` ones, else those stored with the weights, else ImageNet's if there are 1000 outputs
    and the data's classes have ImageNet names, else the data's own. Raises ValueError if their number is not
    that of the outputs, or if a class of the data is not among them.
    """
    # None for a head that is not linear: its outputs are not in a bias of that name.
    outputs = _num_outputs(saved)
    known = given or saved.classes or _imagenet_classes(outputs, data)
    if known is None and _numbers_out_of_order(data):
        raise ValueError(
            f"the data's classes are numbers, which folders sort as {some_names(data)}; {saved.path} does "
            "not name its outputs: name them by `classes`, in their order"
        )
    names = known or data
    if outputs not in (None, len(names)):
        source = "in the data"
        if given:
            source = "given"
        raise ValueError(
            f"{saved.path} distinguishes {outputs} classes, and there are {len(names)} {source}: name all, "
            "in the order of its outputs, by `classes`"
        )
    unknown = sorted(set(data) - set(names))
    if unknown:
        more = "" if len(unknown) == len(data) else " in addition"
        raise ValueError(
            f"{saved.path} knows {some_names(names)}, and the data have {some_names(unknown)}{more}: check "
            "`data_path`; if the folders only have other names, give these by `classes` in the order of its "
            "outputs"
        )
    return names


def _num_outputs(saved: Checkpoint) -> int | None:
    """Outputs of a linear class head; None for other heads, which are checked when the weights are loaded."""
    bias = saved.model.get("head.bias")
    if bias is None:
        return None
    return bias.numel() or None


def _imagenet_classes(outputs: int | None, data: list[str]) -> list[str] | None:
    """ImageNet's classes, if a model with 1000 outputs meets data with some of them."""
    if outputs != 1000 or len(data) >= outputs:
        return None
    from timm.data import ImageNetInfo

    names = ImageNetInfo("imagenet-1k").label_names()
    if not set(data) <= set(names):
        return None
    return names


def _numbers_out_of_order(names: list[str]) -> bool:
    return all(name.isdigit() for name in names) and sorted(names, key=int) != names


def norm_options(name: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The option `norm_eps` of a classifier, if the stored flags name an epsilon and the model takes one."""
    eps = flags.get(EPS_FLAG)
    if eps is None or "norm_eps" not in find(name).options:
        return {}
    return {"norm_eps": eps}


def trained_options(flags: dict) -> dict[str, Any]:
    """Options of a classifier on which its weights depend, from a checkpoint's stored flags."""
    options = {k: flags[k] for k in ("pos_embed", "pool") if flags.get(k) is not None}
    if flags.get("patch_size"):
        # Other programs store a number, or a text.
        sizes = whole_numbers(flags["patch_size"])
        if not sizes or max(sizes) > MOST_PIXELS:
            raise ValueError(f"the stored `patch_size` {shown(flags['patch_size'])} is no size of patches")
        options["patch_size"] = pair(sizes, "patch_size")
    if flags.get("swin_merge_last"):
        options["merge_last"] = True
    return options


def frozen_options(name: str, saved: Checkpoint, pos_embed: str = "auto") -> dict[str, Any]:
    """Options of a classifier whose frozen encoder, with the embeddings of its training, is probed.

    Its tokens come after the final norm. `pos_embed` "auto" is the embedding that the file has.
    """
    if find(name).own_positions:
        # These models embed positions and pool tokens in their own way.
        options = trained_options(saved.args)
    else:
        # Pooling by class token keeps the final norm, for the patch tokens too.
        options = {"pos_embed": "none", "pool": "cls"}
        if not {"pos_embed", "backbone.pos_embed"}.isdisjoint(saved.encoder_weights()):
            options["pos_embed"] = "learned"
        if saved.args.get("patch_embed"):
            options["patch_embed"] = saved.args["patch_embed"]
        options |= norm_options(name, saved.args)
    if pos_embed != "auto":
        options["pos_embed"] = pos_embed
    return options


def freeze_all_but(model: Classifier, blocks: int, keep: Collection[str] = ()) -> list[nn.Module]:
    """Train only the last `blocks` blocks, the heads (MAE Fig. 9), and the new parameters `keep`.

    Returns the frozen batch norms. Their statistics change in every forward pass in training mode, so the
    training has to put them into evaluation mode after each `model.train()`.
    """

    def frozen(name: str) -> bool:
        return name not in keep and model.layer_id(name) < model.num_layers - blocks

    for name, p in model.named_parameters():
        if frozen(name):
            p.requires_grad_(False)
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and frozen(f"{name}.running_mean")
    ]
