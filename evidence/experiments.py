"""The experiments: what each of them trains, on which data, and which figures its table shows.

The flags of an experiment are a recipe, evidence/recipes/NAME.args.
"""

import os
from dataclasses import dataclass, field

from evidence.statistics import Setting, setting
from util.flags.parser import Parser

HERE = os.path.dirname(os.path.abspath(__file__))


@dataclass(frozen=True)
class Column:
    """A figure in a table: its title, its name in the results, and how it is written."""

    title: str
    metric: str
    factor: float = 1.0
    digits: int = 2


@dataclass(frozen=True)
class Experiment:
    """A main that trains the settings of a recipe, and the table of its results.

    `shared` are settings that another experiment trains with the same flags: {name in the table: setting}.
    """

    # The module's name, as the launcher takes it.
    main: str
    title: str
    columns: tuple[Column, ...]
    data: str = "mini_imagenet20"
    shared: dict[str, Setting] = field(default_factory=dict)
    # {title: (follow-up run, source of features)} of scores whose differences get intervals over images.
    dense: dict[str, tuple[str, str]] = field(default_factory=dict)


def recipe(name: str) -> list[str]:
    """The words of an experiment's recipe."""
    # The parser reads @FILE as the mains do: comments and quotes included.
    path = os.path.join(HERE, "recipes", f"{name}.args")
    return Parser(add_help=False).with_recipes([f"@{path}"])


TOP1 = Column("top-1 %", "test_acc1")
CLASS_LOSS = Column("training class loss", "train_class", digits=3)
# Of the label head on validation images; settings without a label have no such figures.
PLACE = (
    Column("position loss", "test_position", digits=3),
    Column("position accuracy %", "test_position_acc", 100),
)
SUPERVISED = (TOP1, CLASS_LOSS, *PLACE)
# The follow-up runs of a pretraining, in the order of its recipe.
FINETUNED = Column("fine-tuned %", "finetune/test_acc1")
WITH_APL = Column("with APL %", "finetune-2/test_acc1")
# A follow-up run of the same main gets a number: linprobe is kNN alone, linprobe-2 the probe of
# the mean token.
PROBED = (
    Column("linear probe %", "linprobe-2/test_acc1"),
    Column("kNN, mean token %", "linprobe/knn20_avg"),
    Column("kNN, class token %", "linprobe/knn20_cls"),
)
# Of frozen patch tokens, mIoU: as they are, without what tells the position of a patch, and with the
# position beside them; "random" is an encoder of random weights. Title: (follow-up run, source of features).
DENSE_ROWS = {
    f"{probe}: {title}": (folder, row)
    for folder, probe in (("segment", "kNN"), ("segment-2", "linear"))
    for row, title in (
        ("encoder", "mIoU"),
        ("without_position", "without position"),
        ("with_position", "with position"),
        ("random", "random encoder"),
    )
}
# An encoder of random weights is the same with and without labels.
COMPARED_ROWS = {title: row for title, row in DENSE_ROWS.items() if "random" not in row}
# Those of the test images have differences only.
TESTED_ROWS = {
    "kNN on test: mIoU": ("segment-3", "encoder"),
    "kNN on test: without position": ("segment-3", "without_position"),
    "kNN on test: with position": ("segment-3", "with_position"),
}
DENSE = tuple(Column(title, f"{folder}/test_miou_{row}") for title, (folder, row) in DENSE_ROWS.items())
# The number of dimensions that the features fill: exp of the entropy of their normalised singular values.
RANKS = (
    Column("effective rank, mean token", "linprobe/effective_rank_avg", digits=1),
    Column("class token", "linprobe/effective_rank_cls", digits=1),
)
PIXEL = Column("pixel loss", "test_pixel", digits=3)
# Fine-tuned first without a label (or with the pretraining's own), then with APL.
MAE = (PIXEL, *PLACE, FINETUNED, WITH_APL, *PROBED)

FINETUNE = "main_finetune"
PRETRAIN = "main_pretrain"
SERE = "main_sere"
# Settings to which other experiments add rows: the ViT of Table 1 and the Swin of Table 2, both with PE.
VIT = setting("supervised_vit", pos_embed="learned", pos_label="none")
VIT_APL = setting("supervised_vit", pos_embed="learned", pos_label="apl")
SWIN = setting("supervised_swin", pos_embed="learned", pos_label="none")
SWIN_APL = setting("supervised_swin", pos_embed="learned", pos_label="apl")

EXPERIMENTS = {
    "supervised_vit": Experiment(FINETUNE, "Supervised ViT (Table 1)", SUPERVISED),
    "supervised_swin": Experiment(FINETUNE, "Supervised Swin of the paper (Table 2)", SUPERVISED),
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
    "supervised_deit": Experiment(FINETUNE, "DeiT (after Table 5)", SUPERVISED),
    "supervised_nest": Experiment(FINETUNE, "NesT (after Table 5)", SUPERVISED),
    "mae": Experiment(PRETRAIN, "Masked autoencoders (after Table 7)", MAE),
    "mae_long": Experiment(PRETRAIN, "Masked autoencoders, trained four times as long", MAE),
    "mae_wide": Experiment(
        PRETRAIN, "Masked autoencoders at ViT-Ti's width, on a GPU", (PIXEL, *PLACE, FINETUNED, *PROBED)
    ),
    "mae_scratch": Experiment(FINETUNE, "The same fine-tuning from scratch", SUPERVISED),
    "mask_ratio": Experiment(PRETRAIN, "Position loss against mask ratio (Figure 8)", (PIXEL, *PLACE)),
    "mae_tokens": Experiment(
        PRETRAIN, "Positional embedding, and half or whole tokens for the label", (PIXEL, *PLACE)
    ),
    "rpl_pairs": Experiment(PRETRAIN, "Relative labels: all pairs, or 8 per query", (PIXEL, *PLACE)),
    "pos_embed_init": Experiment(
        PRETRAIN,
        "Initialisation of the positional embedding in fine-tuning",
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
            "swin_merge_last False, pos_label none": SWIN,
            "swin_merge_last False, pos_label apl": SWIN_APL,
        },
    ),
    "sere_mae_apl": Experiment(
        PRETRAIN, "MAE + APL, at the budget of the SERE comparison", (*PROBED, *RANKS)
    ),
    "sere_mae_apl_sr": Experiment(PRETRAIN, "MAE + APL + same-view self-relations", (*PROBED, *RANKS)),
    "sere_ibot": Experiment(SERE, "iBOT", (*PROBED, *RANKS)),
    "sere_ibot_sr": Experiment(SERE, "iBOT + self-relations (SERE)", (*PROBED, *RANKS)),
    "dense_streets": Experiment(
        PRETRAIN,
        "Segments of streets, pretrained on crops of them",
        (PIXEL, *PLACE, *DENSE),
        "camvid/images",
        dense=COMPARED_ROWS | TESTED_ROWS,
    ),
    "dense_objects": Experiment(
        PRETRAIN,
        "Segments of streets, pretrained on Mini-ImageNet-20",
        (PIXEL, *PLACE, *DENSE),
        dense=COMPARED_ROWS,
    ),
    "cifar10_vit": Experiment(FINETUNE, "Supervised ViT on CIFAR-10", SUPERVISED, "cifar10"),
    "cifar10_mae": Experiment(
        PRETRAIN, "Masked autoencoders on CIFAR-10", (PIXEL, *PLACE, FINETUNED, *PROBED), "cifar10"
    ),
}
