"""Sizes and names of the models. This module imports nothing heavy: command lines can list them at once.

The registries hold the models themselves, under exactly these names.
"""

import re
from collections.abc import Collection, Iterator

# Options of an encoder by the name of its size. Tiny, small and base are DeiT's and ViT's, large and huge
# MAE's. Pico and nano are for experiments on CPUs.
SIZES: dict[str, dict[str, int]] = {
    "pico": {"dim": 96, "depth": 4, "num_heads": 3},
    "nano": {"dim": 128, "depth": 6, "num_heads": 4},
    "tiny": {"dim": 192, "depth": 12, "num_heads": 3},
    "small": {"dim": 384, "depth": 12, "num_heads": 6},
    "base": {"dim": 768, "depth": 12, "num_heads": 12},
    "large": {"dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"dim": 1280, "depth": 32, "num_heads": 16},
}
# Sides of the patches that each size comes with; small patches are for small images.
PATCHES: dict[str, tuple[int, ...]] = {
    "pico": (8, 4),
    "nano": (8, 4),
    "tiny": (16, 8, 4),
    "small": (16, 8, 4),
    "base": (16, 8, 4),
    "large": (16,),
    "huge": (14,),
}


def named_sizes() -> Iterator[tuple[str, int]]:
    """All (size, patch) for which there are models, e.g. ("base", 16)."""
    for size, patches in PATCHES.items():
        for patch in patches:
            yield size, patch


# Sizes of DeiT, each with and without a distillation token.
DEIT_SIZES = (("pico", 8), ("tiny", 16), ("small", 16), ("base", 16))
# MAE's full name of a model -> the short one.
MAE_ALIASES = {
    f"{name}_dec512d8b": name
    for name in ("mae_vit_base_patch16", "mae_vit_large_patch16", "mae_vit_huge_patch14")
}


def mae_names() -> list[str]:
    """Masked autoencoders, which main_pretrain.py trains."""
    return [f"mae_vit_{size}_patch{patch}" for size, patch in named_sizes()] + list(MAE_ALIASES)


def sere_names() -> list[str]:
    """Students of self-distillation, which main_sere.py trains."""
    return [f"sere_vit_{size}_patch{patch}" for size, patch in named_sizes() if size != "huge"]


def classifier_names() -> list[str]:
    """Classifiers of this toolkit; timm's come in addition."""
    deit = [f"deit_{size}{kind}_patch{patch}" for size, patch in DEIT_SIZES for kind in ("", "_distilled")]
    swin = [f"swin_{size}" for size in ("pico", "tiny", "small", "base")]
    so_vit = [f"so_vit_{depth}" for depth in (7, 10, 14, 19)]
    return [f"vit_{size}_patch{patch}" for size, patch in named_sizes()] + deit + swin + so_vit


def same_encoder(name: str, names: Collection[str]) -> str:
    """Return the model among `names` that has the encoder of `name`; '' if there is none.

    mae_vit_X, mae_vit_X_dec512d8b and sere_vit_X have the encoder of the classifier vit_X.
    """
    core = re.sub(r"^(mae|sere)_|_dec512d8b$", "", name)
    for each in (name, core, f"mae_{core}", f"sere_{core}"):
        if each in names:
            return each
    return ""


def nearest_size(dim: int, depth: int, patch: int) -> tuple[str, int] | None:
    """Return the (size, patch) of the models of that width and depth; None if no size has them.

    The patch is the size's first one if it does not come with the given one.
    """
    for size, options in SIZES.items():
        if (options["dim"], options["depth"]) == (dim, depth):
            if patch in PATCHES[size]:
                return size, patch
            return size, PATCHES[size][0]
    return None
