"""Names and shapes of all weights are public: checkpoints of years depend on them.

python tests/house/test_state_dicts.py     writes the snapshot anew, after a change that is meant
"""

import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import models_mae_pl
import models_sere
from backbones import registry as models

SNAPSHOT = ROOT / "tests" / "state_dicts.txt"


def cases() -> dict[str, tuple]:
    """Name -> (builder, options): every entry as it is, and the parts that options add, on a small model."""
    found = {
        name: (build, {})
        for registry in (models_mae_pl.MODELS, models.MODELS, models_sere.MODELS)
        for name, build in registry.items()
        if not name.endswith("_test")
    }  # those of tests/tiny.py
    mae = models_mae_pl.MODELS["mae_vit_pico_patch8"]
    vit = models.MODELS["vit_pico_patch8"]
    sere = models_sere.MODELS["sere_vit_pico_patch8"]
    swin = models.MODELS["swin_pico"]
    for label in ("none", "apl", "rpl", "apl+rpl"):
        found[f"mae_vit_pico_patch8 pos_label={label}"] = (mae, {"pos_label": label})
        found[f"vit_pico_patch8 pos_label={label}"] = (vit, {"pos_label": label})
        found[f"swin_pico pos_label={label}"] = (swin, {"pos_label": label})
    for kind in ("none", "sincos", "learned"):
        found[f"mae_vit_pico_patch8 pos_embed={kind}"] = (mae, {"pos_embed": kind})
        found[f"vit_pico_patch8 pos_embed={kind}"] = (vit, {"pos_embed": kind})
    found["mae_vit_pico_patch8 pos_tokens=full"] = (mae, {"pos_label": "apl+rpl", "pos_tokens": "full"})
    found["mae_vit_pico_patch8 relations"] = (mae, {"sr_spatial": True, "sr_channel": True})
    found["sere_vit_pico_patch8 relations"] = (sere, {"sr_spatial": True, "sr_channel": True})
    found["sere_vit_pico_patch8 patch_prototypes=own"] = (sere, {"patch_prototypes": "own"})
    found["vit_pico_patch8 pool=cls"] = (vit, {"pool": "cls"})
    found["vit_pico_patch8 second_order"] = (vit, {"second_order": {"dims": (16, 8), "fusion": "concat"}})
    found["vit_pico_patch8 patch_embed=conv"] = (vit, {"patch_embed": "conv"})
    return found


def state_dict(build, options: dict) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return build(**options).state_dict()


def lines_of(name: str, state: dict[str, torch.Tensor]) -> str:
    """One line for each kind of weight: numbers in names are replaced by *, and listed behind."""
    kinds: dict[tuple, list[str]] = {}
    for key, value in state.items():
        kind = (re.sub(r"\b\d+\b", "*", key), tuple(value.shape), str(value.dtype).removeprefix("torch."))
        kinds.setdefault(kind, []).append(",".join(re.findall(r"\b\d+\b", key)))
    rows = [
        f"  {key} {list(shape)} {dtype} {as_ranges(found)}" for (key, shape, dtype), found in kinds.items()
    ]
    return "\n".join([name, *sorted(row.rstrip() for row in rows)])


def as_ranges(numbers: list[str]) -> str:
    """0 1 2 3 is 0-3, as far as they follow each other in the order of the state dict."""
    if all(n.isdigit() for n in numbers) and [int(n) for n in numbers] == list(range(len(numbers))):
        return f"0-{len(numbers) - 1}"
    return " ".join(numbers)


def entries() -> dict[str, str]:
    return {text.split("\n")[0]: text for text in SNAPSHOT.read_text().rstrip("\n").split("\n\n")}


@pytest.mark.parametrize("name", list(cases()))
def test_names_and_shapes_stay(name):
    build, options = cases()[name]
    state = state_dict(build, options)
    assert lines_of(name, state) == entries()[name]


def test_the_snapshot_has_nothing_else():
    assert set(entries()) == set(cases())


def write() -> None:
    texts = [lines_of(name, state_dict(*case)) for name, case in cases().items()]
    SNAPSHOT.write_text("\n\n".join(texts) + "\n")


if __name__ == "__main__":
    write()
