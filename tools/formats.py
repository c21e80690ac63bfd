"""Weights from one library's files to another's, each checked: both models see the same images before a file appears.

Our names are facebookresearch/mae's, which for the encoder are timm's too. Hugging Face's `ViTMAE` and `ViT` have their
own, with queries, keys and values apart; files here have the names that all versions of transformers read.
"""

import contextlib
import json
import os
import re
import shutil

import torch
from torch import Tensor

from models_mae_pl import MaskedAutoencoderViT, random_masking
from util.weights import checkpoint
from util.weights.architecture import Architecture
from util.weights.types import Checkpoint

LIMIT = 1e-4  # largest difference between two models' outputs
DECODER = ("decoder_", "mask_token")
# Weights that neither the plain Vision Transformer nor its decoder has: heads of pretraining objectives.
LABEL_HEADS = ("pos_head.", "sr_", "ibot_head.")

# Hugging Face's names of the parts of a block, and of everything else, with ours.
_HF_BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_HF_REST = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "classifier": "head",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_pos_embed": "decoder_pos_embed",
    "decoder.decoder_embed": "decoder_embed",
    "decoder.decoder_norm": "decoder_norm",
    "decoder.decoder_pred": "decoder_pred",
}
_QKV = ("query", "key", "value")


# -- names -------------------------------------------------------------------------------------------------------------
def _split(name: str) -> tuple[str, str]:
    """a.b.weight -> (a.b, .weight); names of bare parameters have no second part."""
    part, _, end = name.rpartition(".")
    return (part, f".{end}") if end in ("weight", "bias") else (name, "")


def from_hf(found: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Weights of a Hugging Face file under our names; ValueError for what a plain Vision Transformer does not have."""
    out = {}
    for name in found:
        part, end = _split(name.removeprefix("vit."))
        if part.startswith("pooler.") or part.endswith((".key", ".value")):
            continue  # a layer on top that pretraining never trained; and what goes with its query
        # decoder_layers is the name in published files, decoder_encoder.layer what transformers 5 writes.
        block = re.fullmatch(
            r"(encoder\.layer|decoder\.(?:decoder_layers|decoder_encoder\.layer))\.(\d+)\.(.+)", part
        )
        start = (
            f"{'decoder_' if block and block[1] != 'encoder.layer' else ''}blocks.{block[2]}."
            if block
            else ""
        )
        if block and block[3] == "attention.attention.query":
            out[f"{start}attn.qkv{end}"] = torch.cat([found[name.replace(".query.", f".{x}.")] for x in _QKV])
        elif block and block[3] in _HF_BLOCK:
            out[start + _HF_BLOCK[block[3]] + end] = found[name]
        elif part in _HF_REST:
            out[_HF_REST[part] + end] = found[name]
        else:
            raise ValueError(f"{path}: {name} is no part of a plain Vision Transformer")
    return out


def to_hf(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Our weights under Hugging Face's names; `prefix` goes before the encoder's: 'vit.', or '' for ViTModel."""
    block_names, rest = ({ours: theirs for theirs, ours in names.items()} for names in (_HF_BLOCK, _HF_REST))
    out = {}
    for name, value in weights.items():
        part, end = _split(name)
        block = re.fullmatch(r"(decoder_)?blocks\.(\d+)\.(.+)", part)
        start = (
            (f"decoder.decoder_layers.{block[2]}." if block[1] else f"{prefix}encoder.layer.{block[2]}.")
            if block
            else ""
        )
        if block and block[3] == "attn.qkv":
            out |= {f"{start}attention.attention.{x}{end}": v for x, v in zip(_QKV, value.chunk(3))}
        elif block:
            out[start + block_names[block[3]] + end] = value
        else:
            top = rest[part].startswith(("decoder.", "classifier"))
            out[("" if top else prefix) + rest[part] + end] = value
    return {k: v.contiguous() for k, v in out.items()}


def read(path: str) -> Checkpoint:
    """Any checkpoint, or a folder of Hugging Face's, as {model, args} in our names; label heads stay behind, and weights of
    which there is a moving average.

    A classifier's `classes` come along where a file of this toolkit names them.
    """
    if os.path.isdir(path):
        state = _read_hf_folder(path)
    else:
        state = checkpoint.load(path)
    if state.kind == "huggingface":
        raise ValueError(f"{path}: give its folder, where config.json tells the number of heads")
    if state.kind == "dino":
        state = Checkpoint(
            path,
            {k.removeprefix("backbone."): v for k, v in state.model.items() if k.startswith("backbone.")},
        )
    weights = state.evaluated_weights()
    if state.kind == "self-distillation":
        weights = state.encoder_weights()
    weights = {k: v for k, v in weights.items() if not k.startswith(LABEL_HEADS)}
    if "dist_token" in weights:
        raise ValueError(
            f"{path} has a distillation token, which plain Vision Transformers lack: it cannot be converted"
        )
    return Checkpoint(path, weights, dict(state.args), state.classes)


def _read_hf_folder(folder: str) -> Checkpoint:
    files = [os.path.join(folder, name) for name in ("config.json", "model.safetensors")]
    missing = [os.path.basename(f) for f in files if not os.path.isfile(f)]
    if missing:
        raise ValueError(
            f"{folder} is no folder of Hugging Face's save_pretrained: it lacks {' and '.join(missing)}"
        )
    with open(files[0]) as f:
        config = json.load(f)
    if not {"image_size", "num_attention_heads"} <= config.keys():
        raise ValueError(f"{folder} holds no Vision Transformer: it is of type {config.get('model_type')}")
    size = config["image_size"]
    args = {
        "input_size": size if isinstance(size, list) else [size],
        "num_heads": config["num_attention_heads"],
        "layer_norm_eps": config.get("layer_norm_eps", 1e-12),
    }
    if "decoder_num_attention_heads" in config:
        args |= {
            "decoder_heads": config["decoder_num_attention_heads"],
            "norm_pix_loss": config["norm_pix_loss"],
        }
    return Checkpoint(folder, from_hf(checkpoint.load(files[1]).model, folder), args)


# -- the check ---------------------------------------------------------------------------------------------------------
def outputs(model, images: Tensor, noise: Tensor, full: bool) -> Tensor:
    """What is compared: predicted patches (B, L, P) of a `full` masked autoencoder, else logits or tokens."""
    if not isinstance(model, MaskedAutoencoderViT):
        return model(images) if model.num_classes else model.forward_features(images)
    if full:
        return model(images, ids_keep=random_masking(noise, 0.75))[1]
    return model.forward_encoder(images, torch.arange(noise.shape[1]).expand(noise.shape))


@torch.no_grad()
def largest_difference(ours, theirs, full: bool) -> float:
    """Between two models' outputs on two random images; `theirs(images, noise)` is a function."""
    g = torch.Generator().manual_seed(0)
    images = torch.randn(2, ours.in_chans, *ours.img_size, generator=g)
    noise = torch.rand(2, ours.patch_embed.num_patches, generator=g)
    return float((outputs(ours, images, noise, full) - theirs(images, noise)).abs().max())


@contextlib.contextmanager
def appears_whole(out: str, path: str):
    """Yields a name beside `out` to write to; what is there becomes `out` unless an error comes."""
    out = out.rstrip("/")
    if os.path.isdir(out) or (os.path.exists(out) and os.path.samefile(out, path)):
        raise ValueError(f"{out} exists: choose another name")
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    partial = os.path.join(os.path.dirname(out), f"partial-{os.path.basename(out)}")
    try:
        yield partial
        os.replace(partial, out)
    finally:
        if os.path.isdir(partial):
            shutil.rmtree(partial)
        elif os.path.exists(partial):
            os.remove(partial)


def refuse_above_limit(difference: float, path: str, name: str) -> None:
    """ValueError where two models differ by more than LIMIT, or by nan."""
    if not difference <= LIMIT:
        raise ValueError(
            f"{path}: our model and {name} differ by {difference:.2g} on the same images (limit {LIMIT:g}): "
            "nothing was written"
        )


# -- the other libraries -----------------------------------------------------------------------------------------------
def timm_options(a: Architecture, heads: int, img_size: tuple[int, int]) -> dict:
    """Keywords of timm's `vit_base_patch16_224` for an architecture."""
    return dict(
        img_size=img_size,
        patch_size=a.patch_size,
        in_chans=a.in_chans,
        embed_dim=a.dim,
        depth=a.depth,
        num_heads=heads,
        mlp_ratio=a.mlp_ratio,
        num_classes=a.classes,
        global_pool="avg" if a.pool == "avg" else "token",
    )


def timm_outputs(weights: dict[str, Tensor], options: dict):
    """timm's model with our weights -> its outputs as a function; no positional embedding becomes a zero one."""
    import timm

    model = timm.create_model("vit_base_patch16_224", **options).eval()
    table = {"pos_embed": torch.zeros_like(model.pos_embed)}
    model.load_state_dict(table | {k: v for k, v in weights.items() if not k.startswith(DECODER)})
    return lambda images, noise: model(images) if options["num_classes"] else model.forward_features(images)


def hf_outputs(folder: str, full: bool, classes: int):
    """Hugging Face's model in a folder -> its outputs as a function."""
    try:
        import transformers
    except ImportError as e:
        raise ValueError(
            'Hugging Face models are checked by transformers, which is not installed: pip install ".[hf]"'
        ) from e
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if full:
        model = transformers.ViTMAEForPreTraining.from_pretrained(folder).eval()
        model.config.mask_ratio = 0.75
        return lambda images, noise: model(images, noise=noise).logits
    if classes:
        model = transformers.ViTForImageClassification.from_pretrained(folder).eval()
        return lambda images, noise: model(images).logits
    model = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    return lambda images, noise: model(images).last_hidden_state


def hf_folder(
    weights: dict[str, Tensor],
    a: Architecture,
    heads: tuple[int, int],
    norm_pix_loss: bool,
    path: str,
    folder: str,
    classes: list[str] | None = None,
) -> str:
    """Write config.json and model.safetensors of the class that fits; returns its name. `classes` become its labels.

    Raises ValueError for what Hugging Face's classes cannot hold: rectangles in ViTMAE, the mean of the patch tokens
    before a classifier.
    """
    from safetensors.torch import save_file

    square = [n[0] if n[0] == n[1] else list(n) for n in (a.img_size, a.patch_size)]
    if a.decoder_depth and not all(isinstance(n, int) for n in square):
        raise ValueError(
            f"{path}: Hugging Face's ViTMAE takes square images and patches, not {a.img_size} and "
            f"{a.patch_size}: export its encoder (--to encoder) and that to hf"
        )
    if a.pool == "avg":
        raise ValueError(
            f"{path} classifies the mean of the patch tokens, Hugging Face's ViT the class token: --to timm can "
            "hold it, or fine-tune with --cls_token"
        )
    name = (
        "ViTMAEForPreTraining"
        if a.decoder_depth
        else "ViTForImageClassification"
        if a.classes
        else "ViTModel"
    )
    config = {
        "architectures": [name],
        "model_type": "vit_mae" if a.decoder_depth else "vit",
        "hidden_size": a.dim,
        "num_hidden_layers": a.depth,
        "num_attention_heads": heads[0],
        "intermediate_size": round(a.dim * a.mlp_ratio),
        "image_size": square[0],
        "patch_size": square[1],
        "num_channels": a.in_chans,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
    }
    if a.decoder_depth:
        config |= {
            "decoder_hidden_size": a.decoder_dim,
            "decoder_num_hidden_layers": a.decoder_depth,
            "decoder_num_attention_heads": heads[1],
            "decoder_intermediate_size": round(a.decoder_dim * a.mlp_ratio),
            "mask_ratio": 0.75,
            "norm_pix_loss": norm_pix_loss,
        }
    if a.classes:
        config["id2label"] = dict(enumerate(classes or (f"LABEL_{i}" for i in range(a.classes))))
        config["label2id"] = {name: i for i, name in config["id2label"].items()}
    os.makedirs(folder)
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f, indent=1)
    save_file(
        to_hf(weights, "" if name == "ViTModel" else "vit."),
        os.path.join(folder, "model.safetensors"),
        metadata={"format": "pt"},
    )
    return name
