"""The claims of Zhang et al. 2023 on positional labels, each as differences between settings of experiments.

The numbers in a claim are the paper's own, in percent points of top-1 accuracy.
"""

from itertools import pairwise

from evidence.experiments import VIT, VIT_APL
from evidence.statistics import Contrast, Setting, setting


def gain(
    experiment: str, label: str, pos_embed: str | None = "learned", metric: str = "test_acc1"
) -> Contrast:
    """What a label adds; `pos_embed` is None for experiments that do not vary it."""
    flags = {}
    name = experiment
    if pos_embed:
        flags = {"pos_embed": pos_embed}
        name += f", PE {pos_embed}"
    return Contrast(
        f"{name}: {label} - none",
        (setting(experiment, pos_label=label, **flags),),
        (setting(experiment, pos_label="none", **flags),),
        metric,
    )


def label_for_pe(experiment: str, label: str) -> Contrast:
    """A label instead of PE."""
    return Contrast(
        f"{experiment}: {label} without PE - PE alone",
        (setting(experiment, pos_embed="none", pos_label=label),),
        (setting(experiment, pos_embed="learned", pos_label="none"),),
    )


def pe_with_label(experiment: str, label: str) -> Contrast:
    """What PE adds to a label."""
    return Contrast(
        f"{experiment}: PE + {label} - {label} alone",
        (setting(experiment, pos_embed="learned", pos_label=label),),
        (setting(experiment, pos_embed="none", pos_label=label),),
    )


def gain_over_gain(more: str, less: str, label: str) -> Contrast:
    """How much more a label adds, on top of PE, in one experiment than in another."""
    larger = gain(more, label)
    smaller = gain(less, label)
    # (label - none in `more`) - (label - none in `less`), as one sum.
    plus = larger.plus + smaller.minus
    minus = larger.minus + smaller.plus
    return Contrast(f"gain of {label}: {more} - {less}", plus, minus)


def relative_over_absolute(experiment: str, pos_embed: str, margin: float | None = None) -> Contrast:
    """RPL instead of APL; with a margin, the claim is that they are equal."""
    return Contrast(
        f"{experiment}, PE {pos_embed}: rpl - apl{within(margin)}",
        (setting(experiment, pos_embed=pos_embed, pos_label="rpl"),),
        (setting(experiment, pos_embed=pos_embed, pos_label="apl"),),
        margin=margin,
    )


def flag_effect(
    experiment: str,
    flag: str,
    values: tuple[object, object],
    metric: str = "test_acc1",
    margin: float | None = None,
    **same: object,
) -> Contrast:
    """What a flag does: its second value against its first one, the flags `same` being equal."""
    # The name is in the order of the difference.
    low, high = values
    name = experiment + "".join(f", {k} {v}" for k, v in same.items())
    return Contrast(
        f"{name}: {metric}, {flag} {high} - {low}{within(margin)}",
        (setting(experiment, **{flag: high}, **same),),
        (setting(experiment, **{flag: low}, **same),),
        metric,
        margin,
    )


def within(margin: float | None) -> str:
    """The end of a contrast's name: its margin, if it has one."""
    if margin is None:
        return ""
    return f", within {margin:g}"


def more_cells(label: str, margin: float | None = None) -> Contrast:
    """8x8 instead of 4x4 cells in the last stage of Swin."""
    return Contrast(
        f"swin, {label}: 8x8 cells - 4x4{within(margin)}",
        (setting("supervised_swin", pos_embed="learned", pos_label=label),),
        (setting("swin_cells", pos_label=label),),
        margin=margin,
    )


def plain_mae(experiment: str) -> tuple[Setting]:
    """Pretrained with PE and without a label."""
    return (setting(experiment, pos_embed="sincos", pos_label="none"),)


def labelled_mae(experiment: str, label: str) -> tuple[Setting]:
    """Pretrained with a label instead of PE."""
    return (setting(experiment, pos_embed="none", pos_label=label),)


def over_scratch(experiment: str, scratch: Setting) -> Contrast:
    """Plain MAE, fine-tuned, against training from scratch."""
    return Contrast(
        f"{experiment}: MAE (PE), fine-tuned with PE - scratch with PE",
        plain_mae(experiment),
        # Training from scratch is not a follow-up run, so its figure has no prefix.
        (scratch,),
        "finetune/test_acc1",
        minus_metric="test_acc1",
    )


def over_mae(experiment: str, label: str, then: str, metric: str) -> Contrast:
    """A label instead of PE in pretraining, fine-tuned with PE and the label `then`, against plain MAE."""
    return Contrast(
        f"{experiment}: MAE + {label}, fine-tuned with PE + {then} - MAE (PE), fine-tuned with PE",
        labelled_mae(experiment, label),
        plain_mae(experiment),
        metric,
        minus_metric="finetune/test_acc1",
    )


def pretrained_label(experiment: str, pos_embed: str) -> Contrast:
    """What APL adds in pretraining, against encoders with PE or without; all are fine-tuned with PE + APL."""
    # The second fine-tuning of these experiments is the one with APL, also after a pretraining without it.
    other = {"sincos": "MAE (PE)", "none": "neither in pretraining"}[pos_embed]
    return Contrast(
        f"{experiment}: MAE + apl - {other}, both fine-tuned with PE + apl",
        labelled_mae(experiment, "apl"),
        (setting(experiment, pos_embed=pos_embed, pos_label="none"),),
        "finetune/test_acc1",
        minus_metric="finetune-2/test_acc1",
    )


def dense_gain(experiment: str, split: str = "val") -> Contrast:
    """What APL adds to patch tokens that have the position of the patch beside them; both without PE."""
    folder = {"val": "segment", "test": "segment-3"}[split]
    return Contrast(
        f"{experiment}, {split}: apl - none, mIoU by kNN with the position",
        labelled_mae(experiment, "apl"),
        labelled_mae(experiment, "none"),
        f"{folder}/test_miou_with_position",
    )


# The settings of Figure 5; the weight 0.5 is the default, with which supervised_vit was run.
WEIGHTS = {0.5: VIT_APL} | {w: setting("label_weight", pos_weight=w) for w in (0.25, 0.75, 1.0, 1.25)}
# Mask ratios of Figure 8.
RATIOS = (0.25, 0.5, 0.6, 0.75, 0.9)
LABELS = ("apl", "rpl")
# Letter -> (the claim, its parts). A claim holds if all of its parts do.
CLAIMS: dict[str, tuple[str, list[Contrast]]] = {
    "a": (
        "ViT without PE: APL beats none (+1.85), RPL beats none (+1.66)",
        # Point gains of ViT-B on ImageNet, first APL, then RPL; so also below.
        [gain(e, label, "none") for e in ("supervised_vit", "cifar10_vit") for label in LABELS],
    ),
    "b": (
        "ViT: labels alone are at least as good as PE alone (+0.28 / +0.09); on Swin they are not "
        "(-0.43 / -0.17)",
        # Of Swin the paper claims the opposite, hence PE - label.
        [label_for_pe(e, label) for e in ("supervised_vit", "cifar10_vit") for label in LABELS]
        + [label_for_pe("supervised_swin", label).reversed() for label in LABELS],
    ),
    "c": (
        "PE + label beats PE (ViT +1.20 / +1.16, Swin-T +0.19 / +0.61; on Mini-ImageNet "
        "DeiT-B +2.82 / +3.18, NesT-B +1.30 / +2.13)",
        [gain(e, label) for e in ("supervised_vit", "supervised_swin", "cifar10_vit") for label in LABELS]
        # DeiT and NesT always have the PE of their models.
        + [gain(e, label, None) for e in ("supervised_deit", "supervised_nest") for label in LABELS],
    ),
    # With and without PE, on all data sets and models that were run so.
    "d": (
        "PE + label beats label alone (ViT +0.92 / +1.07, Swin-T +0.62 / +0.78)",
        [
            pe_with_label(e, label)
            for e in ("supervised_vit", "supervised_swin", "cifar10_vit")
            for label in LABELS
        ],
    ),
    # The paper gives no margin for "equal".
    "e": (
        "RPL beats APL on Swin, with PE and without; on ViT they are equal (here: within 1 point)",
        [relative_over_absolute("supervised_swin", pe) for pe in ("none", "learned")]
        + [relative_over_absolute("supervised_vit", pe, 1.0) for pe in ("none", "learned")],
    ),
    "f": (
        "The gain is larger on less data (ViT-B, Mini-ImageNet +6.15 / +5.69, ImageNet +1.20 / +1.16)",
        # CIFAR-10 has five times as many images as Mini-ImageNet-20.
        [gain_over_gain("supervised_vit", "cifar10_vit", label) for label in LABELS],
    ),
    # A ViT attends globally, a Swin within windows.
    "g": (
        "The gain is larger for global than for window attention (ViT-B 1.20, Swin-B 0.41 to 0.74)",
        [gain_over_gain("supervised_vit", "supervised_swin", label) for label in LABELS],
    ),
    "h": (
        "With a label, horizontal flips help (+0.57); additional vertical flips change nothing "
        "(here: within 1 point)",
        [
            Contrast(
                "PE + apl: hflip 0.5 - 0",
                (VIT_APL,),
                (setting("flips", hflip=0.0, vflip=0.0, pos_label="apl"),),
            ),
            Contrast(
                "PE + apl, hflip 0.5: vflip 0.5 - 0, within 1",
                (setting("flips", hflip=0.5, vflip=0.5, pos_label="apl"),),
                (VIT_APL,),
                margin=1.0,
            ),
        ],
    ),
    "i": (
        "Every weight from 0.25 to 1.25 beats 0; accuracy is flat around 0.5 (here: within 1 point)",
        [Contrast(f"PE + apl: weight {w:g} - 0", (a,), (VIT,)) for w, a in sorted(WEIGHTS.items())]
        + [
            Contrast(f"PE + apl: weight {w:g} - 0.5, within 1", (WEIGHTS[w],), (VIT_APL,), margin=1.0)
            for w in (0.25, 0.75)
        ],
    ),
    "j": (
        "The training class loss is lower with labels (Figure 7)",
        # Reversed, because lower losses are better.
        [
            gain(e, label, pe, "train_class").reversed()
            for e in ("supervised_vit", "supervised_swin")
            for pe in ("none", "learned")
            for label in LABELS
        ],
    ),
    "k": (
        "More cells in Swin's last stage help with labels, and change nothing without them "
        "(here: within 1 point)",
        # Swin's last stage has 8x8 cells, unless the last merging is kept.
        [more_cells("apl"), more_cells("none", 1.0)],
    ),
    "l": (
        "The position loss rises with the mask ratio (Figure 8); "
        "MAE + label > MAE > scratch after fine-tuning (Table 7)",
        # The short experiment, its four times longer version, and one on a GPU.
        [flag_effect("mask_ratio", "mask_ratio", ratios, "test_position") for ratios in pairwise(RATIOS)]
        + [over_mae("mae", label, "apl", "finetune-2/test_acc1") for label in LABELS]
        + [over_scratch("mae", setting("mae_scratch", pos_label="none"))]
        + [over_mae("mae_long", label, label, "finetune/test_acc1") for label in LABELS]
        + [over_mae("mae_wide", "apl", "apl", "finetune/test_acc1")]
        + [pretrained_label("mae_long", pe) for pe in ("none", "sincos")]
        + [over_scratch("mae_long", VIT)]
        + [over_mae("cifar10_mae", label, label, "finetune/test_acc1") for label in LABELS]
        + [over_scratch("cifar10_mae", setting("cifar10_vit", pos_embed="learned", pos_label="none"))],
    ),
    "m": (
        "Ours: PE gives the position away (position accuracy is higher with PE); "
        "half tokens do as well as full ones, and 8 pairs per query as well as all",
        # The margin of 0.02 is in units of the position loss, which is about 4 to 5.
        [
            flag_effect(
                "supervised_vit", "pos_embed", ("none", "learned"), "test_position_acc", pos_label="apl"
            ),
            flag_effect(
                "mae_tokens", "pos_embed", ("none", "sincos"), "test_position_acc", pos_tokens="half"
            ),
            flag_effect(
                "mae_tokens", "pos_tokens", ("half", "full"), "test_position", 0.02, pos_embed="none"
            ),
            flag_effect("rpl_pairs", "rpl_pairs", (0, 8), "test_position", 0.02),
        ],
    ),
    "n": (
        "SERE: self-relations help, in iBOT and on top of labels "
        "(linear probe of the mean token, kNN of the class token)",
        [
            Contrast(f"{more} - {less}: {metric}", (setting(more),), (setting(less),), metric)
            for more, less in (("sere_ibot_sr", "sere_ibot"), ("sere_mae_apl_sr", "sere_mae_apl"))
            for metric in ("linprobe-2/test_acc1", "linprobe/knn20_cls")
        ],
    ),
    "o": (
        "Ours: APL in pretraining helps dense features beyond what the position alone gives",
        [dense_gain("dense_streets"), dense_gain("dense_streets", "test"), dense_gain("dense_objects")],
    ),
}
