"""What is tested, and on what: experiments, and the claims of Zhang et al. 2023 as differences between their runs.

An experiment's flags are evidence/recipes/NAME.args; evidence/cli.py runs them and says what came out.
"""

from dataclasses import dataclass, field
from itertools import pairwise

from evidence.statistics import At, Column, Contrast, at


@dataclass(frozen=True)
class Experiment:
    main: str
    title: str
    columns: tuple[Column, ...]
    data: str = "mini_imagenet20"
    shared: dict[str, At] = field(
        default_factory=dict
    )  # settings that another experiment trains with the same flags


TOP1 = Column("top-1 %", "test_acc1")
CLASS_LOSS = Column("training class loss", "train_class", digits=3)
PLACE = (
    Column("position loss", "test_position", digits=3),
    Column("position accuracy %", "test_position_acc", 100),
)
SUPERVISED = (TOP1, CLASS_LOSS, *PLACE)
FINETUNED, WITH_APL = (
    Column("fine-tuned %", "finetune/test_acc1"),
    Column("with APL %", "finetune-2/test_acc1"),
)
PROBED = (
    Column("linear probe %", "linprobe-2/test_acc1"),
    Column("kNN, mean token %", "linprobe/knn20_avg"),
    Column("kNN, class token %", "linprobe/knn20_cls"),
)
RANKS = (
    Column("effective rank, mean token", "linprobe/effective_rank_avg", digits=1),
    Column("class token", "linprobe/effective_rank_cls", digits=1),
)
PIXEL = Column("pixel loss", "test_pixel", digits=3)
MAE = (PIXEL, *PLACE, FINETUNED, WITH_APL, *PROBED)

FINETUNE, PRETRAIN, SERE = "main_finetune", "main_pretrain", "main_sere"
VIT, VIT_APL = (at("supervised_vit", pos_embed="learned", pos_label=label) for label in ("none", "apl"))
EXPERIMENTS = {
    "supervised_vit": Experiment(FINETUNE, "Supervised ViT (Table 1)", SUPERVISED),
    "supervised_swin": Experiment(FINETUNE, "Supervised Swin, the paper's (Table 2)", SUPERVISED),
    "label_weight": Experiment(
        FINETUNE,
        "Weight of the label loss (Figure 5)",
        SUPERVISED,
        shared={"pos_weight 0.0": VIT, "pos_weight 0.5": VIT_APL},
    ),
    "flips": Experiment(
        FINETUNE,
        "Crops and flips (Table 3)",
        SUPERVISED,
        shared={"hflip 0.5, vflip 0.0, pos_label none": VIT, "hflip 0.5, vflip 0.0, pos_label apl": VIT_APL},
    ),
    "supervised_deit": Experiment(FINETUNE, "DeiT (Table 5's shape)", SUPERVISED),
    "supervised_nest": Experiment(FINETUNE, "NesT (Table 5's shape)", SUPERVISED),
    "mae": Experiment(PRETRAIN, "Masked autoencoders (Table 7's shape)", MAE),
    "mae_long": Experiment(PRETRAIN, "Masked autoencoders, four times as long", MAE),
    "mae_wide": Experiment(
        PRETRAIN, "Masked autoencoders at ViT-Ti's width, on a GPU", (PIXEL, *PLACE, FINETUNED, *PROBED)
    ),
    "mae_scratch": Experiment(FINETUNE, "The same fine-tuning from scratch", SUPERVISED),
    "mask_ratio": Experiment(PRETRAIN, "Position loss against mask ratio (Figure 8)", (PIXEL, *PLACE)),
    "mae_tokens": Experiment(
        PRETRAIN, "Positional embedding and width of the label's token", (PIXEL, *PLACE)
    ),
    "rpl_pairs": Experiment(PRETRAIN, "All pairs of relative labels, or 8 drawn per query", (PIXEL, *PLACE)),
    "pos_embed_init": Experiment(
        PRETRAIN,
        "How the positional embedding comes back",
        (
            Column("zero %", "finetune/test_acc1"),
            Column("sincos %", "finetune-2/test_acc1"),
            Column("normal %", "finetune-3/test_acc1"),
        ),
    ),
    "swin_cells": Experiment(
        FINETUNE,
        "Cells of Swin's last stage",
        SUPERVISED,
        shared={
            f"swin_merge_last False, pos_label {label}": at(
                "supervised_swin", pos_embed="learned", pos_label=label
            )
            for label in ("none", "apl")
        },
    ),
    "sere_mae_apl": Experiment(PRETRAIN, "MAE + APL, budget of SERE's comparison", (*PROBED, *RANKS)),
    "sere_mae_apl_sr": Experiment(PRETRAIN, "MAE + APL + same-view self-relations", (*PROBED, *RANKS)),
    "sere_ibot": Experiment(SERE, "iBOT", (*PROBED, *RANKS)),
    "sere_ibot_sr": Experiment(SERE, "iBOT + self-relations (SERE)", (*PROBED, *RANKS)),
    "cifar10_vit": Experiment(FINETUNE, "Supervised ViT on CIFAR-10", SUPERVISED, "cifar10"),
    "cifar10_mae": Experiment(
        PRETRAIN, "Masked autoencoders on CIFAR-10", (PIXEL, *PLACE, FINETUNED, *PROBED), "cifar10"
    ),
}


def gain(
    experiment: str, label: str, pos_embed: str | None = "learned", metric: str = "test_acc1"
) -> Contrast:
    """What a label adds; pos_embed is None where an experiment has the model's own throughout."""
    same, beside = ({"pos_embed": pos_embed}, f", PE {pos_embed}") if pos_embed else ({}, "")
    return Contrast(
        f"{experiment}{beside}: {label} - none",
        (at(experiment, pos_label=label, **same),),
        (at(experiment, pos_label="none", **same),),
        metric,
    )


def label_for_pe(experiment: str, label: str) -> Contrast:
    return Contrast(
        f"{experiment}: {label} without PE - PE alone",
        (at(experiment, pos_embed="none", pos_label=label),),
        (at(experiment, pos_embed="learned", pos_label="none"),),
    )


def pe_beside(experiment: str, label: str) -> Contrast:
    return Contrast(
        f"{experiment}: PE + {label} - {label} alone",
        (at(experiment, pos_embed="learned", pos_label=label),),
        (at(experiment, pos_embed="none", pos_label=label),),
    )


def gain_over_gain(more: str, less: str, label: str) -> Contrast:
    a, b = gain(more, label), gain(less, label)
    return Contrast(f"gain of {label}: {more} - {less}", a.plus + b.minus, a.minus + b.plus)


def relative_over_absolute(experiment: str, pos_embed: str, margin: float | None = None) -> Contrast:
    return Contrast(
        f"{experiment}, PE {pos_embed}: rpl - apl" + (f", within {margin:g}" if margin else ""),
        (at(experiment, pos_embed=pos_embed, pos_label="rpl"),),
        (at(experiment, pos_embed=pos_embed, pos_label="apl"),),
        margin=margin,
    )


def step(
    experiment: str, flag: str, high, low, metric: str = "test_acc1", margin: float | None = None, **same
) -> Contrast:
    """What a flag does, other flags being equal."""
    beside = "".join(f", {k} {v}" for k, v in same.items())
    return Contrast(
        f"{experiment}{beside}: {metric}, {flag} {high} - {low}" + (f", within {margin:g}" if margin else ""),
        (at(experiment, **{flag: high}, **same),),
        (at(experiment, **{flag: low}, **same),),
        metric,
        margin,
    )


def more_cells(label: str, margin: float | None = None) -> Contrast:
    return Contrast(
        f"swin, {label}: 8x8 cells - 4x4" + (f", within {margin:g}" if margin else ""),
        (at("supervised_swin", pos_embed="learned", pos_label=label),),
        (at("swin_cells", pos_label=label),),
        margin=margin,
    )


def masked(experiment: str, label: str) -> tuple[At]:
    """Pretrained with a label instead of PE; with neither label, plain MAE."""
    return (at(experiment, pos_embed="sincos" if label == "none" else "none", pos_label=label),)


def over_scratch(experiment: str, scratch: At) -> Contrast:
    return Contrast(
        f"{experiment}: MAE (PE), fine-tuned with PE - scratch with PE",
        masked(experiment, "none"),
        (scratch,),
        "finetune/test_acc1",
        minus_metric="test_acc1",
    )


def over_mae(experiment: str, label: str, then: str, metric: str) -> Contrast:
    return Contrast(
        f"{experiment}: MAE + {label}, fine-tuned with PE + {then} - MAE (PE), fine-tuned with PE",
        masked(experiment, label),
        masked(experiment, "none"),
        metric,
        minus_metric="finetune/test_acc1",
    )


def pretrained_label(experiment: str, pos_embed: str) -> Contrast:
    """What APL gives in pretraining alone, over an encoder with or without PE: all are fine-tuned with PE + APL."""
    other = "MAE (PE)" if pos_embed == "sincos" else "neither in pretraining"
    return Contrast(
        f"{experiment}: MAE + apl - {other}, both fine-tuned with PE + apl",
        masked(experiment, "apl"),
        (at(experiment, pos_embed=pos_embed, pos_label="none"),),
        "finetune/test_acc1",
        minus_metric="finetune-2/test_acc1",
    )


WEIGHTS = {0.5: VIT_APL} | {w: at("label_weight", pos_weight=w) for w in (0.25, 0.75, 1.0, 1.25)}
RATIOS = (0.25, 0.5, 0.6, 0.75, 0.9)
LABELS = ("apl", "rpl")
# Zhang et al. 2023, as its tables and figures say; differences of the paper in percent points of top-1.
CHECKLIST = {
    "a": (
        "ViT without PE: APL beats none (+1.85), RPL beats none (+1.66)",
        [gain(e, label, "none") for e in ("supervised_vit", "cifar10_vit") for label in LABELS],
    ),
    "b": (
        "ViT: labels alone are at least as good as PE alone (+0.28 / +0.09); on Swin they are not (-0.43 / -0.17)",
        [label_for_pe(e, label) for e in ("supervised_vit", "cifar10_vit") for label in LABELS]
        + [label_for_pe("supervised_swin", label).turned() for label in LABELS],
    ),
    "c": (
        "PE + label beats PE (ViT +1.20 / +1.16, Swin-T +0.19 / +0.61; on Mini-ImageNet DeiT-B +2.82 / +3.18, NesT-B +1.30 / "
        "+2.13)",
        [gain(e, label) for e in ("supervised_vit", "supervised_swin", "cifar10_vit") for label in LABELS]
        + [gain(e, label, None) for e in ("supervised_deit", "supervised_nest") for label in LABELS],
    ),
    "d": (
        "PE + label beats label alone (ViT +0.92 / +1.07, Swin-T +0.62 / +0.78)",
        [
            pe_beside(e, label)
            for e in ("supervised_vit", "supervised_swin", "cifar10_vit")
            for label in LABELS
        ],
    ),
    "e": (
        "RPL beats APL on Swin, with PE and without; on ViT they are equal (here: within 1 point)",
        [relative_over_absolute("supervised_swin", pe) for pe in ("none", "learned")]
        + [relative_over_absolute("supervised_vit", pe, 1.0) for pe in ("none", "learned")],
    ),
    "f": (
        "The gain is larger on less data (ViT-B, Mini-ImageNet +6.15 / +5.69, ImageNet +1.20 / +1.16)",
        [gain_over_gain("supervised_vit", "cifar10_vit", label) for label in LABELS],
    ),
    "g": (
        "The gain is larger for global than for window attention (ViT-B 1.20, Swin-B 0.41 to 0.74)",
        [gain_over_gain("supervised_vit", "supervised_swin", label) for label in LABELS],
    ),
    "h": (
        "With a label, horizontal flips help (+0.57); vertical ones on top do nothing (here: within 1 point)",
        [
            Contrast(
                "PE + apl: hflip 0.5 - 0", (VIT_APL,), (at("flips", hflip=0.0, vflip=0.0, pos_label="apl"),)
            ),
            Contrast(
                "PE + apl, hflip 0.5: vflip 0.5 - 0, within 1",
                (at("flips", hflip=0.5, vflip=0.5, pos_label="apl"),),
                (VIT_APL,),
                margin=1.0,
            ),
        ],
    ),
    "i": (
        "Any weight from 0.25 to 1.25 beats 0, and it is flat around 0.5 (here: within 1 point)",
        [Contrast(f"PE + apl: weight {w:g} - 0", (a,), (VIT,)) for w, a in sorted(WEIGHTS.items())]
        + [
            Contrast(f"PE + apl: weight {w:g} - 0.5, within 1", (WEIGHTS[w],), (VIT_APL,), margin=1.0)
            for w in (0.25, 0.75)
        ],
    ),
    "j": (
        "The training loss of the classes is lower with labels (Figure 7)",
        [
            gain(e, label, pe, "train_class").turned()
            for e in ("supervised_vit", "supervised_swin")
            for pe in ("none", "learned")
            for label in LABELS
        ],
    ),
    "k": (
        "More cells in Swin's last stage help with labels, and change nothing without (here: within 1 point)",
        [more_cells("apl"), more_cells("none", 1.0)],
    ),
    "l": (
        "The position loss rises with the mask ratio (Figure 8); MAE + label > MAE > scratch after fine-tuning (Table 7)",
        [step("mask_ratio", "mask_ratio", high, low, "test_position") for low, high in pairwise(RATIOS)]
        + [over_mae("mae", label, "apl", "finetune-2/test_acc1") for label in LABELS]
        + [over_scratch("mae", at("mae_scratch", pos_label="none"))]
        + [over_mae("mae_long", label, label, "finetune/test_acc1") for label in LABELS]
        + [over_mae("mae_wide", "apl", "apl", "finetune/test_acc1")]
        + [pretrained_label("mae_long", pe) for pe in ("none", "sincos")]
        + [over_scratch("mae_long", VIT)]
        + [over_mae("cifar10_mae", label, label, "finetune/test_acc1") for label in LABELS]
        + [over_scratch("cifar10_mae", at("cifar10_vit", pos_embed="learned", pos_label="none"))],
    ),
    "m": (
        "Ours: a PE gives the position away (its accuracy is higher with PE); half tokens do as well as full ones, "
        "drawn pairs as well as all",
        [
            step("supervised_vit", "pos_embed", "learned", "none", "test_position_acc", pos_label="apl"),
            step("mae_tokens", "pos_embed", "sincos", "none", "test_position_acc", pos_tokens="half"),
            step("mae_tokens", "pos_tokens", "full", "half", "test_position", 0.02, pos_embed="none"),
            step("rpl_pairs", "rpl_pairs", 8, 0, "test_position", 0.02),
        ],
    ),
    "n": (
        "SERE: self-relations help, in iBOT and beside labels (linear probe of the mean token, kNN of the class token)",
        [
            Contrast(f"{more} - {less}: {metric}", (at(more),), (at(less),), metric)
            for more, less in (("sere_ibot_sr", "sere_ibot"), ("sere_mae_apl_sr", "sere_mae_apl"))
            for metric in ("linprobe-2/test_acc1", "linprobe/knn20_cls")
        ],
    ),
}
