"""All classifiers by name: ours, and any timm backbone as timm/NAME; and the model that a checkpoint holds."""

import difflib

from torch import nn

import models_vit
from backbones import so_vit, swin
from util.data.sources.image_index import some_names
from util.flags.groups import pair
from util.weights.types import Checkpoint

MODELS = models_vit.MODELS | swin.MODELS | so_vit.MODELS


def build_classifier(name: str, **options):
    """`options` are the builder's keywords; ValueError names what there is, and the option that a model does not take."""
    if name.startswith("timm/"):
        from backbones.timm import timm_model  # timm takes seconds to import

        return timm_model(name.removeprefix("timm/"), **options)
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1)
        raise ValueError(
            f"--model {name} is unknown"
            + (f"; did you mean {near[0]}?" if near else "")
            + f" There are {', '.join(MODELS)}, and timm/NAME for timm's"
        )
    return MODELS[name](**options)


def known_classes(saved: Checkpoint, data: list[str], given: list[str] | None = None) -> list[str]:
    """Names of a stored classifier's classes in the order of its outputs, for an evaluation on the classes `data`.

    They are the `given` ones, else those stored beside the weights, else ImageNet's where there are 1000 outputs and the
    data are named like some of them, else the data's own. Raises ValueError where the number of outputs contradicts them
    or a class of the data is not among them.
    """
    known = given or saved.classes
    outputs = (
        len(saved.model.get("head.bias", ())) or None
    )  # of a linear head; others are left to the loading
    if known is None and outputs == 1000 and len(data) < outputs:
        from timm.data import ImageNetInfo

        known = ImageNetInfo("imagenet-1k").label_names()
        known = known if set(data) <= set(known) else None
    if known is None and all(name.isdigit() for name in data) and sorted(data, key=int) != data:
        raise ValueError(
            f"the data's classes are numbers, which folders sort as {some_names(data)}; {saved.path} does not say what "
            "its outputs are called: name them by --classes, in their order"
        )
    if outputs not in (None, len(known or data)):
        raise ValueError(
            f"{saved.path} tells {outputs} classes apart, and there are {len(known or data)} "
            f"{'given' if given else 'in the data'}: name all, in the order of its outputs, by --classes"
        )
    if known and (unknown := sorted(set(data) - set(known))):
        raise ValueError(
            f"{saved.path} knows {some_names(known)}, and the data have {some_names(unknown)} beyond these: they are "
            "other data, or their folders have other names, and --classes gives these in the order of its outputs"
        )
    return known or data


def trained_options(flags: dict) -> dict:
    """Keywords of a classifier's builder that a checkpoint's stored flags name and its weights depend on."""
    options = {k: flags[k] for k in ("pos_embed", "pool") if flags.get(k) is not None}
    if flags.get("patch_size"):
        options["patch_size"] = pair(flags["patch_size"], "patch_size")
    if flags.get("swin_merge_last"):
        options["merge_last"] = True
    return options


def freeze_all_but(model, blocks: int, keep: set[str] = frozenset()) -> None:
    """Train the last `blocks` blocks and the heads (MAE Fig. 9), and the parameters `keep`, which are new."""

    def frozen(name: str) -> bool:
        return name not in keep and model.layer_id(name) < model.num_layers - blocks

    for name, p in model.named_parameters():
        if frozen(name):
            p.requires_grad_(False)
    for name, m in model.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and frozen(f"{name}.running_mean"):
            m.register_forward_pre_hook(lambda norm, _: norm.eval() and None)  # its statistics stay as well
