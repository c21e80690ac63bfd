"""The model whose weights a checkpoint holds."""

import torch

import models_mae_pl
import models_vit
from backbones.registry import MODELS
from util.weights.architecture import Architecture, architecture
from util.weights.checkpoint import describe_mismatch
from util.weights.types import Checkpoint


def model_of(saved: Checkpoint) -> models_mae_pl.MaskedAutoencoderViT | models_vit.VisionTransformer:
    """The model whose weights a checkpoint holds, with these weights, in evaluation mode.

    All but the number of heads shows in the weights: that comes from the stored flags, else from the models of the
    same size, else it is 64 channels a head (32 in the decoder). Without any sign of the image size it is 14 patches
    a side. Raises ValueError for what is no plain Vision Transformer.
    """
    a, args = architecture(saved), saved.args
    heads, decoder_heads, _ = heads_of(a, args)
    options = dict(
        img_size=a.img_size or (14 * a.patch_size[0], 14 * a.patch_size[1]),
        patch_size=a.patch_size,
        in_chans=a.in_chans,
        dim=a.dim,
        depth=a.depth,
        num_heads=heads,
        mlp_ratio=a.mlp_ratio,
        pos_embed="learned" if a.pos_embed else "none",
        pos_label="+".join(a.labels) or "none",
        pos_tokens=args.get("pos_tokens", "half"),
    )
    if a.decoder_depth:
        model = models_mae_pl.MaskedAutoencoderViT(
            **options,
            decoder_dim=a.decoder_dim,
            decoder_depth=a.decoder_depth,
            decoder_heads=decoder_heads,
            norm_pix_loss=bool(args.get("norm_pix_loss")),
        )
    else:
        kind = (
            models_vit.DistilledVisionTransformer
            if "dist_token" in saved.model
            else models_vit.VisionTransformer
        )
        model = kind(**options, num_classes=a.classes, pool=a.pool)
    weights = {
        k: v for k, v in saved.evaluated_weights().items() if not k.startswith("sr_")
    }  # SERE's relation heads
    problem = describe_mismatch(model.state_dict(), weights)
    if problem:
        raise ValueError(
            f"{saved.path} holds no plain Vision Transformer, it differs in its parts: {problem}"
        )
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
