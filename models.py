"""All classifiers by name: ours, and any timm backbone as timm/NAME; and the model that a checkpoint holds."""
import difflib

import torch
from torch import nn

import models_mae_pl
import models_so_vit
import models_swin
import models_vit
from util.args import head_options, pair, resolve_head
from util.checkpoint import describe_mismatch, load, load_for_evaluation
from util.image_index import some_names
from util.weights import Architecture, architecture, evaluated_weights

MODELS = models_vit.MODELS | models_swin.MODELS | models_so_vit.MODELS


def build_classifier(name: str, **options):
    """`options` are the builder's keywords; ValueError names what there is, and the option that a model does not take."""
    if name.startswith("timm/"):
        from models_timm import timm_model  # timm takes seconds to import

        return timm_model(name.removeprefix("timm/"), **options)
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1)
        raise ValueError(f"--model {name} is unknown" + (f"; did you mean {near[0]}?" if near else "")
                         + f" There are {', '.join(MODELS)}, and timm/NAME for timm's")
    return MODELS[name](**options)


def model_of(state: dict, path: str) -> models_mae_pl.MaskedAutoencoderViT | models_vit.VisionTransformer:
    """The model whose weights a checkpoint holds, with these weights, in evaluation mode.

    All but the number of heads shows in the weights: that comes from the stored flags, else from the models of the
    same size, else it is 64 channels a head (32 in the decoder). Without any sign of the image size it is 14 patches
    a side. Raises ValueError for what is no plain Vision Transformer.
    """
    a, args = architecture(state, path), state.get("args") or {}
    heads, decoder_heads, _ = heads_of(a, args)
    options = dict(
        img_size=a.img_size or (14 * a.patch_size[0], 14 * a.patch_size[1]), patch_size=a.patch_size, in_chans=a.in_chans,
        dim=a.dim, depth=a.depth, num_heads=heads, mlp_ratio=a.mlp_ratio, pos_embed="learned" if a.pos_embed else "none",
        pos_label="+".join(a.labels) or "none", pos_tokens=args.get("pos_tokens", "half"),
    )
    if a.decoder_depth:
        model = models_mae_pl.MaskedAutoencoderViT(
            **options, decoder_dim=a.decoder_dim, decoder_depth=a.decoder_depth, decoder_heads=decoder_heads,
            norm_pix_loss=bool(args.get("norm_pix_loss")))
    else:
        kind = models_vit.DistilledVisionTransformer if "dist_token" in state["model"] else models_vit.VisionTransformer
        model = kind(**options, num_classes=a.classes, pool=a.pool)
    weights = {k: v for k, v in evaluated_weights(state).items() if not k.startswith("sr_")}  # SERE's relation heads
    problem = describe_mismatch(model.state_dict(), weights)
    if problem:
        raise ValueError(f"{path} holds no plain Vision Transformer, it differs in its parts: {problem}")
    model.load_state_dict(weights)
    return model.eval()


def heads_of(a: Architecture, args: dict) -> tuple[int, int, bool]:
    """(heads, decoder heads, whether anything says so): the flags `num_heads` and `model` do, and a size that we have."""
    size, heads, decoder_heads = models_mae_pl.name_and_heads(a.dim, a.depth, a.decoder_dim, a.patch_size[0])
    build = (models_mae_pl.MODELS | MODELS).get(args.get("model"))
    if build is not None:
        with torch.device("meta"):  # costs nothing: no numbers are made
            named = build(img_size=a.patch_size, patch_size=a.patch_size, pos_label="none")
        heads = named.blocks[0].attn.num_heads
        if a.decoder_depth and hasattr(named, "decoder_blocks"):
            decoder_heads = named.decoder_blocks[0].attn.num_heads
    known = bool(build is not None or size or "num_heads" in args)
    return args.get("num_heads", heads), args.get("decoder_heads", decoder_heads), known


def known_classes(state: dict, path: str, data: list[str], given: list[str] | None = None) -> list[str]:
    """Names of a stored classifier's classes in the order of its outputs, for an evaluation on the classes `data`.

    They are the `given` ones, else those stored beside the weights, else ImageNet's where there are 1000 outputs and the
    data are named like some of them, else the data's own. Raises ValueError where the number of outputs contradicts them
    or a class of the data is not among them.
    """
    known = given or state.get("classes")
    outputs = len(state["model"].get("head.bias", ())) or None  # of a linear head; others are left to the loading
    if known is None and outputs == 1000 and len(data) < outputs:
        from timm.data import ImageNetInfo

        known = ImageNetInfo("imagenet-1k").label_names()
        known = known if set(data) <= set(known) else None
    if known is None and all(name.isdigit() for name in data) and sorted(data, key=int) != data:
        raise ValueError(f"the data's classes are numbers, which folders sort as {some_names(data)}; {path} does not say what "
                         "its outputs are called: name them by --classes, in their order")
    if outputs not in (None, len(known or data)):
        raise ValueError(f"{path} tells {outputs} classes apart, and there are {len(known or data)} "
                         f"{'given' if given else 'in the data'}: name all, in the order of its outputs, by --classes")
    if known and (unknown := sorted(set(data) - set(known))):
        raise ValueError(f"{path} knows {some_names(known)}, and the data have {some_names(unknown)} beyond these: they are "
                         "other data, or their folders have other names, and --classes gives these in the order of its outputs")
    return known or data


def trained_options(flags: dict) -> dict:
    """Keywords of a classifier's builder that a checkpoint's stored flags name and its weights depend on."""
    options = {k: flags[k] for k in ("pos_embed", "pool") if flags.get(k) is not None}
    if flags.get("patch_size"):
        options["patch_size"] = pair(flags["patch_size"], "patch_size")
    if flags.get("swin_merge_last"):
        options["merge_last"] = True
    return options


def build_teacher(name: str, file: str, *, classes: list[str], img_size: tuple[int, int], in_chans: int,
                  mean: tuple[float, ...], std: tuple[float, ...]) -> nn.Module:
    """A frozen classifier for distillation: a model of ours in `file`, or timm's pretrained one where `file` is ''.

    It takes images that were normalised with the student's `mean` and `std`, whatever its own are. Raises ValueError where
    its classes are not the data's, in their order.
    """
    if file:
        saved = load(file)
        flags = saved.get("args") or {}
        if saved.get("classes", classes) != classes:
            raise ValueError(f"--distill_checkpoint {file} knows the classes {some_names(saved['classes'])}, the data have "
                             f"{some_names(classes)}: fine-tune a teacher on them")
        options = head_options(name, resolve_head({}, name, saved, file)) | trained_options(flags)
        teacher = build_classifier(name, img_size=img_size, in_chans=in_chans, num_classes=len(classes), **options)
        load_for_evaluation(teacher, saved, file)
        own = flags.get("mean") or mean, flags.get("std") or std
    else:
        teacher = pretrained_teacher(name, len(classes))
        own = teacher.pretrained_cfg["mean"], teacher.pretrained_cfg["std"]
    teacher = Renormalized(teacher, (mean, std), own).eval().requires_grad_(False)
    try:
        teacher(torch.zeros(1, in_chans, *img_size))
    except (AssertionError, RuntimeError) as e:
        size = f"{in_chans}x{img_size[0]}x{img_size[1]}"
        raise ValueError(f"--distill {name} does not take images of {size}: {e}") from e
    return teacher


def pretrained_teacher(name: str, num_classes: int) -> nn.Module:
    """A timm model with its published weights; ValueError where there are none, or its classes are not as many."""
    import timm

    try:
        model = timm.create_model(name.removeprefix("timm/"), pretrained=True)
    except Exception as e:  # an unknown name, no weights, no network: many types, one remedy
        raise ValueError(f"--distill {name}: timm cannot give its pretrained weights ({e}); train a teacher with "
                         "main_finetune.py and give it with --distill_checkpoint") from e
    if model.num_classes != num_classes:
        raise ValueError(f"--distill {name} knows {model.num_classes} classes, the data have {num_classes}: "
                         "fine-tune a teacher on them and give it with --distill_checkpoint")
    return model


class Renormalized(nn.Module):
    """A model for images that were normalised with another (mean, std) than its own."""

    def __init__(self, model: nn.Module, given: tuple, own: tuple):
        super().__init__()
        self.model = model
        (mean, std), (own_mean, own_std) = ([torch.tensor(x)[:, None, None] for x in stats] for stats in (given, own))
        self.register_buffer("scale", std / own_std)  # (C, 1, 1)
        self.register_buffer("shift", (mean - own_mean) / own_std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x * self.scale + self.shift)


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
