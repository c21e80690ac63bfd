"""Weights under the names of other libraries, and the models of these libraries to compare ours with.

Our names are facebookresearch/mae's, which for the encoder are timm's too. Hugging Face's `ViTMAE` and `ViT`
have their own, with separate queries, keys and values. Files written here have the names that all versions of
transformers read.
"""

import contextlib
import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from layers.contract import NORM_EPS, Trunk
from models_mae_pl import MaskedAutoencoderViT, random_masking
from models_vit import VisionTransformer
from tools.deploy.inputs import INPUT_FIELD, INPUT_NAMES, InputFacts, input_flags
from util.files import LAST_CHECKPOINT
from util.files.atomic import read_json
from util.files.formats import hf_import, hf_weights
from util.weights.architecture import Architecture
from util.weights.files import load
from util.weights.types import Checkpoint, stored_eps
from util.weights.validate import plain_flags, shown

Weights = dict[str, Tensor]
Model = MaskedAutoencoderViT | VisionTransformer
# (images, noise) -> what `outputs` compares.
Outputs = Callable[[Tensor, Tensor], Tensor]

# Largest difference between the outputs of two models that count as equal.
LIMIT = 1e-4
# The mask ratio of the comparison.
MASK_RATIO = 0.75
DECODER = ("decoder_", "mask_token")
MOST_NUMBERS = 6  # of a flag in messages
# Weights of pretraining objectives, which neither the plain Vision Transformer nor its decoder has.
LABEL_HEADS = ("pos_head.", "sr_", "ibot_head.", "masked_embed", "channel_sere", "pixel_sere")

# Hugging Face's names of the parts of a block, and of everything else, with ours.
_HF_BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    # Stands for query, key and value, which are one layer of ours.
    "attention.attention.query": "attn.qkv",
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
_OUR_BLOCK = {ours: theirs for theirs, ours in _HF_BLOCK.items()}
_OUR_REST = {ours: theirs for theirs, ours in _HF_REST.items()}
_QKV = ("query", "key", "value")


# -- names ---------------------------------------------------------------------------------------------------
def _split(name: str) -> tuple[str, str]:
    """a.b.weight -> (a.b, .weight); the second part is '' for parameters that are not part of a layer."""
    part, _, end = name.rpartition(".")
    if end in ("weight", "bias"):
        return part, f".{end}"
    return name, ""


def from_hf(weights: Weights, path: str) -> Weights:
    """The weights of a Hugging Face file under our names.

    Raises ValueError if the file has a part that a plain Vision Transformer does not have.
    """
    out = {}
    for name, value in weights.items():
        part, end = _split(name.removeprefix("vit."))
        # The pooler is a layer on top that pretraining never trained. Keys and values go with their query.
        if part.startswith("pooler.") or part.endswith((".key", ".value")):
            continue
        ours = _our_name(part)
        if ours is None:
            raise ValueError(f"{path}: {shown(name)} is not part of a plain Vision Transformer")
        if part.endswith(".query"):
            value = _joined_qkv(weights, name, path)
        out[ours + end] = value
    return out


def _joined_qkv(weights: Weights, name: str, path: str) -> Tensor:
    """Queries, keys and values in one weight (3 C, ...), from the name of the queries'."""
    names = [name.replace(".query.", f".{x}.") for x in _QKV]
    missing = [n for n in names if n not in weights]
    if missing:
        raise ValueError(f"{path} lacks {shown(missing[0])}: it is damaged, use another one")
    parts = [weights[n] for n in names]
    if not parts[0].ndim or any(part.shape != parts[0].shape for part in parts):
        raise ValueError(f"{path}: {shown(name)}, its keys and its values differ in shape: use another one")
    return torch.cat(parts)


def _our_name(part: str) -> str | None:
    """Our name for a part of a Hugging Face model; None if we do not have it."""
    # `decoder_layers` is the name in published files, `decoder_encoder.layer` what transformers 5 writes.
    block = re.fullmatch(
        r"(encoder\.layer|decoder\.(?:decoder_layers|decoder_encoder\.layer))\.(\d+)\.(.+)", part
    )
    if block is None:
        return _HF_REST.get(part)
    stack, number, inner = block.groups()
    if inner not in _HF_BLOCK:
        return None
    blocks = "decoder_blocks"
    if stack == "encoder.layer":
        blocks = "blocks"
    return f"{blocks}.{number}.{_HF_BLOCK[inner]}"


def to_hf(weights: Weights, prefix: str) -> Weights:
    """Our weights under Hugging Face's names. `prefix` precedes the encoder's: 'vit.', or '' for ViTModel."""
    out: Weights = {}
    for name, value in weights.items():
        part, end = _split(name)
        theirs = _hf_name(part, prefix)
        if part.endswith(".attn.qkv"):
            layer = theirs.removesuffix("query")
            # (3 C, ...) -> 3 x (C, ...)
            out |= {f"{layer}{x}{end}": v for x, v in zip(_QKV, value.chunk(3))}
        else:
            out[theirs + end] = value
    # safetensors writes contiguous tensors only.
    return {k: v.contiguous() for k, v in out.items()}


def _hf_name(part: str, prefix: str) -> str:
    """Hugging Face's name for a part of our models."""
    block = re.fullmatch(r"(decoder_)?blocks\.(\d+)\.(.+)", part)
    if block is None:
        theirs = _OUR_REST[part]
        if theirs.startswith(("decoder.", "classifier")):
            return theirs
        return prefix + theirs
    in_decoder, number, inner = block.groups()
    layers = f"{prefix}encoder.layer"
    if in_decoder:
        layers = "decoder.decoder_layers"
    return f"{layers}.{number}.{_OUR_BLOCK[inner]}"


# -- what an image is ----------------------------------------------------------------------------------------
def input_note(flags: Mapping[str, Any], library: str, place: str) -> str:
    """Say what another library does not do with images; '' for usual ones. `place` is where it is stored."""
    found = input_flags(flags)
    if not found:
        return ""
    parts = [f"{name} {short_list(value)}" for name, value in found.items()]
    return (
        f"the model's images are not 8-bit RGB: {', '.join(parts)} ({place}); {library} does not apply that, "
        "so do it before the model: pick the channels, map the range to 0 to 1 and clip, normalise"
    )


def short_list(value: Any) -> str:
    """The first numbers of a flag that may have hundreds."""
    if not isinstance(value, list):
        return shown(value)
    some = [f"{x:.6g}" for x in value[:MOST_NUMBERS]]
    if len(value) > MOST_NUMBERS:
        some.append(f"... ({len(value)} numbers)")
    return " ".join(some)


# -- reading -------------------------------------------------------------------------------------------------
def is_hf_folder(path: str) -> bool:
    """Whether a path is to be read as a Hugging Face folder: a folder, but not of a run of ours."""
    return os.path.isdir(path) and not os.path.exists(os.path.join(path, LAST_CHECKPOINT))


def read(path: str) -> Checkpoint:
    """Any checkpoint, or a Hugging Face folder, with its evaluated weights under our names.

    Label heads are left out, and of a self-distillation run all but the teacher's encoder. Flags and class
    names are kept. Raises ValueError for a Hugging Face file without its folder, and for models with a
    distillation token.
    """
    return readable(load_any(path))


def load_any(path: str) -> Checkpoint:
    """Any checkpoint as it is stored, or a Hugging Face folder under our names."""
    if is_hf_folder(path):
        return _read_hf_folder(path)
    return load(path)


def readable(checkpoint: Checkpoint) -> Checkpoint:
    """What `read` returns of a checkpoint; raises ValueError as it does."""
    path = checkpoint.path
    if checkpoint.kind == "huggingface":
        folder = os.path.dirname(path)
        raise ValueError(
            f"{path} needs config.json beside it, which stores the number of heads: {hf_import(folder)}"
        )
    if checkpoint.kind == "dino":
        # Without the stored flags, which are DINO's.
        checkpoint = Checkpoint(path, checkpoint.encoder_weights())
    if checkpoint.kind == "self-distillation":
        weights = checkpoint.encoder_weights()
    else:
        weights = checkpoint.evaluated_weights()
    weights = {k: v for k, v in weights.items() if not k.startswith(LABEL_HEADS)}
    if "dist_token" in weights:
        raise ValueError(
            f"{path} has a distillation token, which a plain Vision Transformer does not have: it cannot be "
            "converted"
        )
    return Checkpoint(path, weights, dict(checkpoint.args), checkpoint.classes)


def _read_hf_folder(folder: str) -> Checkpoint:
    files = hf_weights(folder)
    missing = []
    if not os.path.isfile(os.path.join(folder, "config.json")):
        missing.append("config.json")
    if not files:
        missing.append("model.safetensors")
    # Parts say how many they are: model-00001-of-00002.safetensors.
    total = re.search(r"-of-(\d+)", "".join(files[:1]))
    if total is not None and len(files) != int(total[1]):
        missing.append(f"{int(total[1]) - len(files)} of the {int(total[1])} parts of the weights")
    if missing:
        raise ValueError(
            f"{folder} is not a folder of Hugging Face's save_pretrained: it lacks {' and '.join(missing)}"
        )
    config = read_json(os.path.join(folder, "config.json"), dict)
    if not {"image_size", "num_attention_heads"} <= config.keys():
        kind = shown(config.get("model_type"))
        raise ValueError(f"{folder} does not hold a Vision Transformer: its model_type is {kind}")
    weights: Weights = {}
    for name in files:
        weights |= load(os.path.join(folder, name)).model
    flags = plain_flags(folder, _flags_of(config), strict=True)
    return Checkpoint(folder, from_hf(weights, folder), flags)


def _flags_of(config: dict[str, Any]) -> dict[str, Any]:
    """The facts of a Hugging Face configuration that weights do not show, as flags."""
    size = config["image_size"]
    if not isinstance(size, list):
        size = [size]
    flags = {
        "input_size": size,
        "num_heads": config["num_attention_heads"],
        # transformers' default for ViT.
        "layer_norm_eps": config.get("layer_norm_eps", 1e-12),
    }
    if isinstance(config.get(INPUT_FIELD), dict):
        flags |= {name: config[INPUT_FIELD][name] for name in INPUT_NAMES if name in config[INPUT_FIELD]}
    if "decoder_num_attention_heads" in config:
        flags["decoder_heads"] = config["decoder_num_attention_heads"]
        flags["norm_pix_loss"] = config.get("norm_pix_loss")
    return flags


# -- comparison ----------------------------------------------------------------------------------------------
def outputs(model: Model, images: Tensor, noise: Tensor, full: bool) -> Tensor:
    """Predicted patches (B, L, P) of a `full` masked autoencoder; logits or tokens of other models."""
    if not isinstance(model, MaskedAutoencoderViT):
        if model.num_classes:
            return model(images)
        return model.forward_features(images)
    if full:
        return model(images, ids_keep=random_masking(noise, MASK_RATIO))[1]
    all_cells = torch.arange(noise.shape[1]).expand(noise.shape)  # (B, L)
    return model.forward_encoder(images, all_cells)


@torch.no_grad()
def largest_difference(ours: Model, theirs: Outputs, full: bool) -> float:
    """The largest difference between two models' outputs for two random images."""
    g = torch.Generator().manual_seed(0)
    images = torch.randn(2, ours.in_chans, *ours.img_size, generator=g)
    noise = torch.rand(2, ours.patch_embed.num_patches, generator=g)
    return float((outputs(ours, images, noise, full) - theirs(images, noise)).abs().max())


def refuse_above_limit(difference: float, path: str, name: str) -> None:
    """Raise ValueError if two models differ by more than LIMIT, or by nan."""
    # Not `difference > LIMIT`, which is false for nan.
    if not difference <= LIMIT:
        raise ValueError(
            f"{path}: our model and {name} differ by {difference:.2g} on the same images (limit {LIMIT:g}): "
            "nothing was written"
        )


@contextlib.contextmanager
def appears_whole(out: str, path: str) -> Iterator[str]:
    """Yield a temporary name next to `out`, which becomes `out` at the end unless an error was raised.

    Raises ValueError if `out` is a folder or the file `path` itself.
    """
    out = out.rstrip("/")
    if os.path.isdir(out) or (os.path.exists(out) and os.path.samefile(out, path)):
        raise ValueError(f"{out} exists: choose another name")
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    # The suffix stays last: it decides the format.
    partial = os.path.join(os.path.dirname(out), f"partial-{os.path.basename(out)}")
    try:
        yield partial
        os.replace(partial, out)
    finally:
        if os.path.isdir(partial):
            shutil.rmtree(partial)
        elif os.path.exists(partial):
            os.remove(partial)


# -- timm ----------------------------------------------------------------------------------------------------
# The architecture in timm that the options make others of.
TIMM_NAME = "vit_base_patch16_224"


class NormOf(functools.partial):
    """A layer norm of some epsilon, shown as the Python code that makes it."""

    def __repr__(self) -> str:
        return f"functools.partial(torch.nn.LayerNorm, eps={self.keywords['eps']!r})"


def timm_options(arch: Architecture, trunk: Trunk, img_size: tuple[int, int]) -> dict[str, Any]:
    """Keywords that make timm's `TIMM_NAME` a model of this architecture."""
    norm = {}
    if trunk.norm_eps != NORM_EPS:
        norm["norm_layer"] = NormOf(torch.nn.LayerNorm, eps=trunk.norm_eps)
    pool = "token"
    if arch.pool == "avg":
        pool = "avg"
    return dict(
        img_size=img_size,
        patch_size=arch.patch_size,
        in_chans=arch.in_chans,
        embed_dim=arch.dim,
        depth=arch.depth,
        num_heads=trunk.num_heads,
        mlp_ratio=arch.mlp_ratio,
        num_classes=arch.classes,
        global_pool=pool,
        **norm,
    )


def timm_outputs(weights: Weights, options: dict[str, Any]) -> Outputs:
    """The outputs of timm's model with our weights."""
    import timm

    # timm annotates no more than a module.
    model: Any = timm.create_model(TIMM_NAME, **options).eval()
    # A model without positional embedding is one with a zero embedding.
    table = {"pos_embed": torch.zeros_like(model.pos_embed)}
    model.load_state_dict(table | {k: v for k, v in weights.items() if not k.startswith(DECODER)})
    if options["num_classes"]:
        return lambda images, noise: model(images)
    return lambda images, noise: model.forward_features(images)


def timm_file(weights: Weights, flags: Mapping[str, Any], config: dict[str, Any], file: str) -> Weights:
    """Write weights as safetensors, with what timm's readers of weights ignore, and return them read back.

    The metadata are `pretrained_cfg`, which is `config`, and `args`, the flags of unusual images.
    """
    from safetensors.torch import load_file, save_file

    metadata = {"pretrained_cfg": json.dumps(config)}
    if found := input_flags(flags):
        metadata["args"] = json.dumps(found)
    save_file(weights, file, metadata=metadata)
    return load_file(file)


def timm_folder(
    weights: Weights, flags: Mapping[str, Any], options: dict[str, Any], config: dict[str, Any], folder: str
) -> str:
    """Write config.json and pytorch_model.bin as timm does, and return the code that loads the folder.

    JSON does not hold the class of a norm with another epsilon: it goes into the code.
    """
    plain = {name: value for name, value in options.items() if name != "norm_layer"}
    stored = {
        "architecture": TIMM_NAME,
        "num_classes": options["num_classes"],
        "num_features": options["embed_dim"],
        "global_pool": options["global_pool"],
        "model_args": plain,
        "pretrained_cfg": config,
    }
    if found := input_flags(flags):
        stored[INPUT_FIELD] = found
    os.makedirs(folder)
    # Not as safetensors, which timm 1.0.21 does not read from a folder.
    torch.save(weights, os.path.join(folder, "pytorch_model.bin"))
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(stored, f, indent=1)
    more = "".join(f", {name}={value!r}" for name, value in options.items() if name not in plain)
    return f"timm.create_model('local-dir:{{out}}', pretrained=True{more})"


def timm_folder_outputs(folder: str, options: dict[str, Any]) -> Outputs:
    """The outputs of timm's model in a folder."""
    import timm

    norm = {name: value for name, value in options.items() if name == "norm_layer"}
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, **norm).eval()
    if options["num_classes"]:
        return lambda images, noise: model(images)
    return lambda images, noise: model.forward_features(images)


# -- Hugging Face --------------------------------------------------------------------------------------------
def hf_outputs(folder: str, full: bool, classes: int) -> Outputs:
    """The outputs of Hugging Face's model in a folder. Raises ValueError if transformers is not installed."""
    try:
        import transformers
    except ImportError as e:
        raise ValueError(
            "Hugging Face models are compared by means of transformers, which is not installed: "
            'pip install ".[hf]"'
        ) from e
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if full:
        model = transformers.ViTMAEForPreTraining.from_pretrained(folder).eval()
        model.config.mask_ratio = MASK_RATIO
        return lambda images, noise: model(images, noise=noise).logits
    if classes:
        model = transformers.ViTForImageClassification.from_pretrained(folder).eval()
        return lambda images, noise: model(images).logits
    # The pooler is new in every model, and its outputs are not compared.
    model = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    return lambda images, noise: model(images).last_hidden_state


def hf_folder(
    checkpoint: Checkpoint, arch: Architecture, heads: tuple[int, int], facts: InputFacts, folder: str
) -> str:
    """Write config.json and model.safetensors of the Hugging Face class that fits, and return its name.

    `heads` are the numbers of attention heads of encoder and decoder. If transformers has a processor of
    such images, preprocessor_config.json describes it. Raises ValueError for what Hugging
    Face's classes cannot hold: rectangles in ViTMAE, the mean of the patch tokens before a classifier.
    """
    from safetensors.torch import save_file

    _check_hf_can_hold(checkpoint.path, arch)
    name = _hf_class(arch)
    config = _hf_config(name, arch, heads) | stored_eps(checkpoint.args)
    if arch.decoder_depth:
        config["norm_pix_loss"] = bool(checkpoint.args.get("norm_pix_loss"))
    if found := input_flags(checkpoint.args):
        config[INPUT_FIELD] = found
    if arch.classes:
        # transformers' own names of classes without names.
        labels = checkpoint.classes or [f"LABEL_{i}" for i in range(arch.classes)]
        config["id2label"] = dict(enumerate(labels))
        config["label2id"] = {label: i for i, label in enumerate(labels)}
    os.makedirs(folder)
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f, indent=1)
    if not facts.without_processor():
        with open(os.path.join(folder, "preprocessor_config.json"), "w") as f:
            json.dump(facts.hf_processor(), f, indent=1)
    prefix = "vit."
    if name == "ViTModel":
        prefix = ""
    save_file(
        to_hf(checkpoint.model, prefix),
        os.path.join(folder, "model.safetensors"),
        metadata={"format": "pt"},
    )
    return name


def _check_hf_can_hold(path: str, arch: Architecture) -> None:
    is_square = all(isinstance(_square(size), int) for size in (arch.img_size, arch.patch_size))
    if arch.decoder_depth and not is_square:
        raise ValueError(
            f"{path}: Hugging Face's ViTMAE takes square images and patches, not {arch.img_size} and "
            f"{arch.patch_size}: export its encoder (`to` encoder), and that to hf"
        )
    if arch.pool == "avg":
        raise ValueError(
            f"{path} classifies the mean of the patch tokens, Hugging Face's ViT the class token: export it "
            "with `to` timm, or fine-tune one that classifies that token (main_finetune.py `cls_token`)"
        )


def _hf_class(arch: Architecture) -> str:
    if arch.decoder_depth:
        return "ViTMAEForPreTraining"
    if arch.classes:
        return "ViTForImageClassification"
    return "ViTModel"


def _square(size: tuple[int, int] | None) -> int | list[int]:
    """(H, W) as a configuration stores it: one number for squares."""
    # Conversions store the image size before they read the architecture.
    assert size is not None
    if size[0] == size[1]:
        return size[0]
    return list(size)


def _hf_config(name: str, arch: Architecture, heads: tuple[int, int]) -> dict[str, Any]:
    config = {
        "architectures": [name],
        "model_type": "vit",
        "hidden_size": arch.dim,
        "num_hidden_layers": arch.depth,
        "num_attention_heads": heads[0],
        "intermediate_size": round(arch.dim * arch.mlp_ratio),
        "image_size": _square(arch.img_size),
        "patch_size": _square(arch.patch_size),
        "num_channels": arch.in_chans,
        # transformers' default is 1e-12.
        "layer_norm_eps": NORM_EPS,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
    }
    if arch.decoder_depth:
        config |= {
            "model_type": "vit_mae",
            "decoder_hidden_size": arch.decoder_dim,
            "decoder_num_hidden_layers": arch.decoder_depth,
            "decoder_num_attention_heads": heads[1],
            "decoder_intermediate_size": round(arch.decoder_dim * arch.mlp_ratio),
            "mask_ratio": MASK_RATIO,
        }
    return config
