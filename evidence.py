"""The claims of the positional-label paper, tested: experiments over seeds, their figures, and what they say.

    python evidence.py list                                          # experiments, what was run, claims and verdicts
    python evidence.py run supervised_vit mae --data DIR             # DIR/mini_imagenet20/{train,val}.tar, DIR/cifar10/...
    python evidence.py collect supervised_vit                        # runs/evidence/NAME -> results/NAME.json and logs
    python evidence.py write                                         # results/ -> the tables and verdicts in RESULTS.md

An experiment is a recipe, recipes/evidence/NAME.args: flags of a main, a --sweep over seeds and settings, and what follows.
`run` gives it to the launcher that clusters use, here with --cluster local; what is finished is not run again. Flags after
-- go to the launcher and the main: `-- --cluster slurm --ngpus 1 --device cuda`, `-- --epochs 20 --model vit_small_patch8`;
under SLURM `collect` once the jobs are done.
"""
import argparse
import glob
import json
import os
import shlex
import sys
from dataclasses import dataclass
from itertools import pairwise

from util.args import Parser, run
from util.results import Column, Contrast, at, collect, copy_logs, plus_minus, rows_of, table, together, write_json

ROOT = os.path.dirname(os.path.abspath(__file__))


@dataclass(frozen=True)
class Experiment:
    main: str
    title: str
    columns: tuple[Column, ...]
    data: str = "mini_imagenet20"


TOP1 = Column("top-1 %", "test_acc1")
CLASS_LOSS = Column("training class loss", "train_class", digits=3)
PLACE = (Column("position loss", "test_position", digits=3), Column("position accuracy %", "test_position_acc", 100))
SUPERVISED = (TOP1, CLASS_LOSS, *PLACE)
FINETUNED = (Column("fine-tuned %", "finetune/test_acc1"), Column("with APL %", "finetune-2/test_acc1"))
PROBED = (Column("linear probe %", "linprobe-2/test_acc1"), Column("kNN, mean token %", "linprobe/knn20_avg"),
          Column("kNN, class token %", "linprobe/knn20_cls"))
RANKS = (Column("effective rank, mean token", "linprobe/effective_rank_avg", digits=1),
         Column("class token", "linprobe/effective_rank_cls", digits=1))
PIXEL = Column("pixel loss", "test_pixel", digits=3)
MAE = (PIXEL, *PLACE, *FINETUNED, *PROBED)

FINETUNE, PRETRAIN, SERE = "main_finetune", "main_pretrain", "main_sere"
EXPERIMENTS = {
    "supervised_vit": Experiment(FINETUNE, "Supervised ViT (Table 1)", SUPERVISED),
    "supervised_swin": Experiment(FINETUNE, "Supervised Swin, the paper's (Table 2)", SUPERVISED),
    "label_weight": Experiment(FINETUNE, "Weight of the label loss (Figure 5)", SUPERVISED),
    "flips": Experiment(FINETUNE, "Crops and flips (Table 3)", SUPERVISED),
    "supervised_deit": Experiment(FINETUNE, "DeiT (Table 5's shape)", SUPERVISED),
    "supervised_nest": Experiment(FINETUNE, "NesT (Table 5's shape)", SUPERVISED),
    "mae": Experiment(PRETRAIN, "Masked autoencoders (Table 7's shape)", MAE),
    "mae_scratch": Experiment(FINETUNE, "The same fine-tuning from scratch", SUPERVISED),
    "mask_ratio": Experiment(PRETRAIN, "Position loss against mask ratio (Figure 8)", (PIXEL, *PLACE)),
    "mae_tokens": Experiment(PRETRAIN, "Positional embedding and width of the label's token", (PIXEL, *PLACE)),
    "rpl_pairs": Experiment(PRETRAIN, "All pairs of relative labels, or 8 drawn per query", (PIXEL, *PLACE)),
    "pos_embed_init": Experiment(PRETRAIN, "How the positional embedding comes back", (
        Column("zero %", "finetune/test_acc1"), Column("sincos %", "finetune-2/test_acc1"),
        Column("normal %", "finetune-3/test_acc1"))),
    "swin_cells": Experiment(FINETUNE, "Cells of Swin's last stage", SUPERVISED),
    "sere_mae_apl": Experiment(PRETRAIN, "MAE + APL, budget of SERE's comparison", (*PROBED, *RANKS)),
    "sere_mae_apl_sr": Experiment(PRETRAIN, "MAE + APL + same-view self-relations", (*PROBED, *RANKS)),
    "sere_ibot": Experiment(SERE, "iBOT", (*PROBED, *RANKS)),
    "sere_ibot_sr": Experiment(SERE, "iBOT + self-relations (SERE)", (*PROBED, *RANKS)),
    "cifar10_vit": Experiment(FINETUNE, "Supervised ViT on CIFAR-10", SUPERVISED, "cifar10"),
    "cifar10_mae": Experiment(PRETRAIN, "Masked autoencoders on CIFAR-10", MAE, "cifar10"),
}


def gain(experiment: str, label: str, pos_embed: str = "learned", metric: str = "test_acc1") -> Contrast:
    """What a label adds."""
    return Contrast(f"{experiment}, PE {pos_embed}: {label} - none", (at(experiment, pos_embed=pos_embed, pos_label=label),),
                    (at(experiment, pos_embed=pos_embed, pos_label="none"),), metric)


def label_for_pe(experiment: str, label: str) -> Contrast:
    return Contrast(f"{experiment}: {label} without PE - PE alone", (at(experiment, pos_embed="none", pos_label=label),),
                    (at(experiment, pos_embed="learned", pos_label="none"),))


def pe_beside(experiment: str, label: str) -> Contrast:
    return Contrast(f"{experiment}: PE + {label} - {label} alone", (at(experiment, pos_embed="learned", pos_label=label),),
                    (at(experiment, pos_embed="none", pos_label=label),))


def gain_over_gain(more: str, less: str, label: str) -> Contrast:
    a, b = gain(more, label), gain(less, label)
    return Contrast(f"gain of {label}: {more} - {less}", a.plus + b.minus, a.minus + b.plus)


def relative_over_absolute(experiment: str, pos_embed: str, margin: float | None = None) -> Contrast:
    return Contrast(f"{experiment}, PE {pos_embed}: rpl - apl" + (f", within {margin:g}" if margin else ""),
                    (at(experiment, pos_embed=pos_embed, pos_label="rpl"),),
                    (at(experiment, pos_embed=pos_embed, pos_label="apl"),), margin=margin)


def step(experiment: str, flag: str, high, low, metric: str = "test_acc1", margin: float | None = None, **same) -> Contrast:
    """What a flag does, other flags being equal."""
    beside = "".join(f", {k} {v}" for k, v in same.items())
    return Contrast(f"{experiment}{beside}: {metric}, {flag} {high} - {low}" + (f", within {margin:g}" if margin else ""),
                    (at(experiment, **{flag: high}, **same),), (at(experiment, **{flag: low}, **same),), metric, margin)


def over_scratch() -> Contrast:
    return Contrast("MAE (PE), fine-tuned with PE - scratch", (at("mae", pos_embed="sincos", pos_label="none"),),
                    (at("mae_scratch", pos_label="none"),), "finetune/test_acc1", minus_metric="test_acc1")


def over_mae(label: str) -> Contrast:
    return Contrast(f"MAE + {label}, fine-tuned with PE + APL - MAE (PE), fine-tuned with PE",
                    (at("mae", pos_embed="none", pos_label=label),), (at("mae", pos_embed="sincos", pos_label="none"),),
                    "finetune-2/test_acc1", minus_metric="finetune/test_acc1")


RATIOS = (0.25, 0.5, 0.6, 0.75, 0.9)
LABELS = ("apl", "rpl")
# Zhang et al. 2023, as its tables and figures say; differences of the paper in percent points of top-1.
CHECKLIST = {
    "a": ("ViT without PE: APL beats none (+1.85), RPL beats none (+1.66)",
          [gain(e, label, "none") for e in ("supervised_vit", "cifar10_vit") for label in LABELS]),
    "b": ("ViT: labels alone are at least as good as PE alone (+0.28 / +0.09); on Swin they are not (-0.43 / -0.17)",
          [label_for_pe(e, label) for e in ("supervised_vit", "cifar10_vit") for label in LABELS]),
    "c": ("PE + label beats PE (ViT +1.20 / +1.16, Swin-T +0.19 / +0.61)",
          [gain(e, label) for e in ("supervised_vit", "supervised_swin", "cifar10_vit") for label in LABELS]),
    "d": ("PE + label beats label alone (ViT +0.92 / +1.07, Swin-T +0.62 / +0.78)",
          [pe_beside(e, label) for e in ("supervised_vit", "supervised_swin", "cifar10_vit") for label in LABELS]),
    "e": ("RPL beats APL on Swin, with PE and without; on ViT they are equal (here: within 1 point)",
          [relative_over_absolute("supervised_swin", pe) for pe in ("none", "learned")]
          + [relative_over_absolute("supervised_vit", pe, 1.0) for pe in ("none", "learned")]),
    "f": ("The gain is larger on less data (ViT-B, Mini-ImageNet +6.15 / +5.69, ImageNet +1.20 / +1.16)",
          [gain_over_gain("supervised_vit", "cifar10_vit", label) for label in LABELS]),
    "g": ("The gain is larger for global than for window attention (ViT-B 1.20, Swin-B 0.41 to 0.74)",
          [gain_over_gain("supervised_vit", "supervised_swin", label) for label in LABELS]),
    "h": ("With a label, horizontal flips help (+0.57); vertical ones on top do nothing (here: within 1 point)",
          [step("flips", "hflip", 0.5, 0.0, vflip=0.0, pos_label="apl"),
           step("flips", "vflip", 0.5, 0.0, margin=1.0, hflip=0.5, pos_label="apl")]),
    "i": ("Any weight from 0.25 to 1.25 beats 0, and it is flat around 0.5 (here: within 1 point)",
          [step("label_weight", "pos_weight", w, 0.0) for w in (0.25, 0.5, 0.75, 1.0, 1.25)]
          + [step("label_weight", "pos_weight", w, 0.5, margin=1.0) for w in (0.25, 0.75)]),
    "j": ("The training loss of the classes is lower with labels (Figure 7)",
          [gain("supervised_vit", label, pe, "train_class").turned() for pe in ("none", "learned") for label in LABELS]),
    "k": ("More cells in Swin's last stage help with labels, and change nothing without (here: within 1 point)",
          [step("swin_cells", "swin_merge_last", False, True, pos_label="apl"),
           step("swin_cells", "swin_merge_last", False, True, margin=1.0, pos_label="none")]),
    "l": ("The position loss rises with the mask ratio (Figure 8); MAE + label > MAE > scratch after fine-tuning (Table 7)",
          [step("mask_ratio", "mask_ratio", high, low, "test_position") for low, high in pairwise(RATIOS)]
          + [over_mae("apl"), over_mae("rpl"), over_scratch()]),
    "m": ("Ours: labels cannot be read off a PE; half tokens do as well as full ones, drawn pairs as well as all",
          [step("mae_tokens", "pos_embed", "sincos", "none", "test_position_acc", pos_tokens="half"),
           step("mae_tokens", "pos_tokens", "full", "half", "test_position", 0.02, pos_embed="none"),
           step("rpl_pairs", "rpl_pairs", 8, 0, "test_position", 0.02)]),
}


def recipe(name: str) -> list[str]:
    path = os.path.join(ROOT, "recipes", "evidence", f"{name}.args")
    return Parser(add_help=False).with_recipes([f"@{path}"])


def run_experiment(name: str, data: str, runs: str, max_parallel: int, more: list[str]) -> int:
    from util.launch import launch

    # Runs side by side on a CPU share its cores; more threads than cores are slower than one after the other.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max_parallel)))
    words = recipe(name)
    end = words.index("--then") if "--then" in words else len(words)
    flags = ["--cluster", "local", "--max_parallel", str(max_parallel), "--job_dir", os.path.join(runs, name),
             "--data_path", os.path.join(data, EXPERIMENTS[name].data)]
    return launch(EXPERIMENTS[name].main, words[:end] + flags + more + words[end:])


def collect_experiment(name: str, runs: str, results: str) -> None:
    """results/NAME.json, and the logs of its runs in results/NAME."""
    folder = os.path.join(runs, name)
    found = {"experiment": name, "recipe": shlex.join(recipe(name))} | collect(folder)
    os.makedirs(results, exist_ok=True)
    write_json(os.path.join(results, f"{name}.json"), found)
    copy_logs(folder, os.path.join(results, name))
    print(f"{name}: {len(found['runs'])} runs" + (f", missing: {', '.join(found['missing'])}" if found["missing"] else ""))


def load(results: str) -> dict[str, dict]:
    found = {}
    for path in sorted(glob.glob(os.path.join(results, "*.json"))):
        with open(path) as f:
            found[os.path.basename(path).removesuffix(".json")] = json.load(f)
    return found


def checklist(found: dict[str, dict]) -> str:
    """The claims, a row each: the verdict on each part, with its difference and 95 % interval."""
    lines = ["| | claim | verdict | parts: mean paired difference ± half of its 95 % interval (seeds) |", "|---|---|---|---|"]
    for letter, (claim, contrasts) in CHECKLIST.items():
        verdicts, parts = [c.verdict(found) for c in contrasts], []
        for contrast, verdict in zip(contrasts, verdicts):
            difference = contrast.differences(found)
            if difference.values:
                digits = 2 if "acc1" in contrast.metric else 4
                parts.append(f"{contrast.what}: **{plus_minus(difference, digits)}** ({len(difference.values)}), {verdict}")
        left = {a.experiment for c, v in zip(contrasts, verdicts) if v == "not run" for a in c.plus + c.minus} - set(found)
        parts += [f"not run: {', '.join(sorted(left))}"] if left else []
        lines.append(f"| {letter} | {claim} | **{together(verdicts)}** | {'<br>'.join(parts)} |")
    return "\n".join(lines)


def section(name: str, result: dict) -> str:
    """Command, hardware, time, and the table of an experiment."""
    machine = f"{', '.join(result['machines']) or 'unknown machine'}; torch {result['versions'].get('torch', '?')}"
    logs = f"logs in [results/{name}](results/{name})"
    said = [f"`python evidence.py run {name} --data DIR` ([recipe](recipes/evidence/{name}.args), {logs}); {machine}; "
            f"{result['hours']:g} hours of runs. Mean ± half of the 95 % interval over seeds."]
    if result["missing"]:
        said.append(f"Not finished: {', '.join(result['missing'])}.")
    return "\n".join(said) + "\n\n" + table(rows_of(result), EXPERIMENTS[name].columns)


def blocks(found: dict[str, dict]) -> dict[str, str]:
    """{mark on the page: what belongs there}."""
    sections = {name: section(name, found[name]) if name in found else
                f"Not run yet: `python evidence.py run {name} --data DIR` ([recipe](recipes/evidence/{name}.args))."
                for name in EXPERIMENTS}
    return {"checklist": checklist(found)} | sections


def filled(text: str, contents: dict[str, str]) -> str:
    """A page with what stands between <!-- NAME --> and <!-- end NAME --> written anew; ValueError names missing marks."""
    for name, content in contents.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"the page needs one place {begin.strip()} ... {end}, each on a line of its own")
        text = text[:text.index(begin)] + begin + content + "\n" + text[text.index(end):]
    return text


def get_args_parser() -> Parser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("command", choices=["list", "run", "collect", "write"])
    p.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(EXPERIMENTS)}")
    p.add_argument("--data", default="", help="folder of the data sets' folders")
    p.add_argument("--runs", default="runs/evidence", help="where the runs are kept")
    p.add_argument("--results", default=os.path.join(ROOT, "results"))
    p.add_argument("--page", default=os.path.join(ROOT, "RESULTS.md"))
    p.add_argument("--max_parallel", default=1, type=int, help="runs at a time")
    return p


def main(args, more: list[str]) -> int:
    unknown = [name for name in args.names if name not in EXPERIMENTS]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no such experiment; there are {', '.join(EXPERIMENTS)}")
    if args.command in ("run", "collect") and not args.names:
        raise ValueError(f"{args.command} which? There are {', '.join(EXPERIMENTS)}")
    if args.command == "run":
        if not args.data:
            raise ValueError("--data DIR: the folder that holds mini_imagenet20 and cifar10")
        failed = [name for name in args.names if run_experiment(name, args.data, args.runs, args.max_parallel, more)]
        if failed:
            print(f"failed: {', '.join(failed)}; the logs are named above", file=sys.stderr)
            return 1
    if args.command == "run" and ("--dry_run" in more or "slurm" in more):
        return 0  # nothing to collect, or not yet
    if args.command in ("run", "collect"):
        for name in args.names:
            collect_experiment(name, args.runs, args.results)
        return 0
    found = load(args.results)
    if args.command == "list":
        for name, e in EXPERIMENTS.items():
            print(f"{name:18} {e.title}: " + (f"{len(found[name]['runs'])} runs" if name in found else "not run"))
        for letter, (claim, contrasts) in CHECKLIST.items():
            print(f"{letter}  {together([c.verdict(found) for c in contrasts])}: {claim}")
        return 0
    with open(args.page) as f:
        text = filled(f.read(), blocks(found))
    with open(args.page, "w") as f:
        f.write(text)
    print(f"wrote {args.page}")
    return 0


if __name__ == "__main__":
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    sys.exit(run(lambda args: main(args, words[cut + 1:]), get_args_parser().parse_args(words[:cut])))
