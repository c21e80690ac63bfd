"""The model whose weights a checkpoint holds."""

from typing import Any

import models_mae_pl
import models_vit
from backbones.registry import MODELS
from util.weights.architecture import Architecture, architecture
from util.weights.checkpoint import describe_mismatch
from util.weights.types import EPS_FLAG, Checkpoint
from util.weights.validate import MOST_CHANNELS, shown


def model_of(saved: Checkpoint) -> models_mae_pl.MaskedAutoencoderViT | models_vit.VisionTransformer:
    """The model whose weights a checkpoint holds, with these weights, in evaluation mode.

    The weights determine everything but the number of heads, for which see `heads_of`. If nothing
    determines the image size, it is 14 patches a side. Raises ValueError, which names the file, if
    the checkpoint is not a plain Vision Transformer, or if its flags do not fit its weights.
    """
    arch = architecture(saved)
    try:
        model = _build(arch, saved.args, distilled="dist_token" in saved.model)
    except ValueError as e:
        raise ValueError(f"{saved.path}: its flags do not fit its weights: {e}; use another file") from None
    # SERE's relation heads are not part of a plain Vision Transformer.
    weights = {k: v for k, v in saved.evaluated_weights().items() if not k.startswith("sr_")}
    problem = describe_mismatch(model.state_dict(), weights)
    if problem:
        raise ValueError(f"{saved.path} is not a plain Vision Transformer, its weights differ: {problem}")
    model.load_state_dict(weights)
    return model.eval()


def is_plain(saved: Checkpoint) -> bool:
    """Whether the weights of a checkpoint are those of a plain Vision Transformer."""
    try:
        architecture(saved)
    except ValueError:
        return False
    return True


def _build(a: Architecture, flags: dict, distilled: bool) -> Any:
    heads, decoder_heads, _ = heads_of(a, flags)
    options: dict[str, Any] = {
        "img_size": a.img_size or (14 * a.patch_size[0], 14 * a.patch_size[1]),
        "patch_size": a.patch_size,
        "in_chans": a.in_chans,
        "dim": a.dim,
        "depth": a.depth,
        "num_heads": heads,
        "mlp_ratio": a.mlp_ratio,
        "pos_embed": "none",
        "pos_label": "+".join(a.labels) or "none",
        "pos_tokens": flags.get("pos_tokens") or "half",
    }
    if flags.get(EPS_FLAG) is not None:
        options["norm_eps"] = flags[EPS_FLAG]
    if a.pos_embed:
        options["pos_embed"] = "learned"
    if a.decoder_depth:
        return models_mae_pl.MAE_VIT(
            **options,
            decoder_dim=a.decoder_dim,
            decoder_depth=a.decoder_depth,
            decoder_heads=decoder_heads,
            norm_pix_loss=bool(flags.get("norm_pix_loss")),
        )
    entry = models_vit.VIT
    if distilled:
        entry = models_vit.DEIT_DISTILLED
    return entry(**options, num_classes=a.classes, pool=a.pool)


def heads_of(a: Architecture, flags: dict) -> tuple[int, int, bool]:
    """(heads, decoder heads, whether they are known) of a checkpoint, which its weights do not determine.

    They are the stored flags `num_heads` and `decoder_heads`, else those of the stored model's name, else
    those of the models of the same size, else a head has 64 channels (32 in the decoder). Raises ValueError
    if a stored one is no number of heads.
    """
    size, heads, decoder_heads = models_mae_pl.name_and_heads(a.dim, a.depth, a.decoder_dim, a.patch_size[0])
    entry = (models_mae_pl.MODELS | MODELS).get(flags.get("model") or "")
    # Of a plain trunk: Swin has other numbers of heads in each stage.
    if entry is not None and "depth" in entry.options:
        heads = entry.options["num_heads"]
        if a.decoder_depth:
            decoder_heads = entry.options.get("decoder_heads", decoder_heads)
    known = bool(entry is not None or size or flags.get("num_heads"))
    return (
        _stored_heads(flags, "num_heads", heads),
        _stored_heads(flags, "decoder_heads", decoder_heads),
        known,
    )


def _stored_heads(flags: dict, name: str, usual: int) -> int:
    """A stored number of heads; `usual` if none is stored."""
    value = flags.get(name)
    if value is None:
        return usual
    if type(value) is not int or not 1 <= value <= MOST_CHANNELS:
        raise ValueError(f"`{name}` is {shown(value)}, expected a whole number from 1 to {MOST_CHANNELS}")
    return value
