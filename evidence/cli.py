"""The claims of the positional-label paper, tested: experiments over seeds, their figures, and what they say.

    python -m evidence list                                          # experiments, what was run, claims and verdicts
    python -m evidence run supervised_vit mae --data DIR --results OWN  # DIR/mini_imagenet20/{train,val}.tar, DIR/cifar10/...
    python -m evidence run mae --data DIR --missing                  # what results/mae.json lacks, be it from another machine
    python -m evidence collect supervised_vit                        # runs/evidence/NAME -> evidence/results/NAME.json and logs
    python -m evidence write                                         # evidence/results -> the tables of RESULTS.md

An experiment is a recipe, evidence/recipes/NAME.args: flags of a main, a --sweep over seeds and settings, and what follows.
`run` gives it to the launcher that clusters use, here with --cluster local; what is finished is not run again. Flags after
-- go to the launcher and the main: `-- --cluster slurm --ngpus 1 --device cuda`, `-- --epochs 20 --model vit_small_patch8`;
under SLURM `collect` once the jobs are done. evidence/results has ours, with the flags that they were run with
(--device cpu); runs of other flags are not mixed with them: --results OWN is a folder for yours.
"""

import argparse
import glob
import json
import os
import re
import shlex
import sys

from evidence.claims import CHECKLIST, EXPERIMENTS
from evidence.statistics import (
    as_noted,
    collect,
    copy_logs,
    merged,
    plus_minus,
    rows_of,
    table,
    together,
    write_json,
)
from util.flags.parser import Parser

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)


def recipe(name: str) -> list[str]:
    path = os.path.join(HERE, "recipes", f"{name}.args")
    return Parser(add_help=False).with_recipes([f"@{path}"])


def launcher_words(
    name: str, data: str, runs: str, max_parallel: int, before: dict | None, missing: bool, more: list[str]
) -> list[str]:
    """The recipe for the launcher; with `missing` without the points that `before` has, and [] where it has all of them."""
    from util.cluster.sweep import plan

    words = recipe(name)
    swept, end = words.index("--sweep"), words.index("--then") if "--then" in words else len(words)
    flags = [
        "--cluster",
        "local",
        "--max_parallel",
        str(max_parallel),
        "--job_dir",
        os.path.join(runs, name),
        "--data_path",
        os.path.join(data, EXPERIMENTS[name].data),
    ]
    if before and missing:
        known = {run["name"] for run in before["runs"]}
        points = plan(EXPERIMENTS[name].main, words[:swept], words[swept + 1 : end], [], runs)
        wanted = [p.name for p in points if p.name not in known]
        if not wanted:
            return []
        flags += ["--only", *wanted]
    return words[:end] + flags + more + words[end:]


def main_flags(words: list[str]) -> str:
    """Of the launcher's words the main's flags, as results note them."""
    from util.cluster.launch import add_cluster_flags, with_chain

    cluster = Parser(add_help=False)
    add_cluster_flags(cluster)
    return as_noted(cluster.parse_known_args(with_chain(words)[0])[1])


def run_experiments(launched: dict[str, list[str]], max_parallel: int) -> list[str]:
    """Give {experiment: words} to the launcher, one after the other -> those that failed."""
    from util.cluster.launch import launch

    # Runs side by side on a CPU share its cores; more threads than cores are slower than one after the other.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max_parallel)))
    return [name for name, words in launched.items() if launch(EXPERIMENTS[name].main, words)]


def collect_experiment(name: str, runs: str, results: str) -> None:
    """Write NAME.json and the logs of its runs, in NAME; runs of the same flags that are there already are kept.

    ValueError where it has runs of other flags.
    """
    folder, path = os.path.join(runs, name), os.path.join(results, f"{name}.json")
    found = {"experiment": name, "recipe": shlex.join(recipe(name))} | collect(folder)
    before = load(results).get(name)
    check_same_flags(path, before, found["flags"], found["recipe"])
    if before:
        found = merged(before, found)
    os.makedirs(results, exist_ok=True)
    write_json(path, found)
    copy_logs(folder, os.path.join(results, name))
    print(
        f"{name}: {len(found['runs'])} runs"
        + (f", missing: {', '.join(found['missing'])}" if found["missing"] else "")
    )


def check_same_flags(path: str, before: dict | None, flags: str, recipe: str) -> None:
    """ValueError where results have runs of other flags: these would be lost, or stand beside the new ones in one table."""
    if not before or (before["flags"] == flags and but_seeds(before["recipe"]) == but_seeds(recipe)):
        return
    parts = [
        f" {f} {shlex.join(but_seeds(r))}".split(" --")[1:]
        for f, r in ((before["flags"], before["recipe"]), (flags, recipe))
    ]
    old, new = (
        " ".join(f"--{w}" for w in dict.fromkeys(a) if w not in b) or "nothing"
        for a, b in (parts, parts[::-1])
    )
    raise ValueError(
        f"{path} has {len(before['runs'])} runs of other flags (there alone: {old}; here alone: {new}): give "
        f"--results DIR, or its flags after --, or delete it and the logs in {path.removesuffix('.json')}"
    )


def but_seeds(recipe: str) -> list[str]:
    """A recipe to which seeds were added still trains its earlier runs as they were trained."""
    return [word for word in shlex.split(recipe) if not word.startswith("seed=")]


def load(results: str) -> dict[str, dict]:
    found = {}
    for path in sorted(glob.glob(os.path.join(results, "*.json"))):
        with open(path) as f:
            found[os.path.basename(path).removesuffix(".json")] = json.load(f)
    return found


def checklist(found: dict[str, dict]) -> str:
    """The claims, a row each: the verdict on each part, with its difference and 95 % interval."""
    lines = [
        "| | claim | verdict | parts: mean paired difference ± half of its 95 % interval (seeds) |",
        "|---|---|---|---|",
    ]
    for letter, (claim, contrasts) in CHECKLIST.items():
        verdicts, parts = [c.verdict(found) for c in contrasts], []
        for contrast, verdict in zip(contrasts, verdicts):
            difference = contrast.differences(found)
            if difference.values:
                digits = 2 if "acc1" in contrast.metric or "knn" in contrast.metric else 4
                parts.append(
                    f"{contrast.what}: **{plus_minus(difference, digits)}** ({len(difference.values)}), {verdict}"
                )
        left = {
            a.experiment for c, v in zip(contrasts, verdicts) if v == "not run" for a in c.plus + c.minus
        } - set(found)
        parts += [f"not run: {', '.join(sorted(left))}"] if left else []
        used = dict.fromkeys(a.experiment for c in contrasts for a in c.plus + c.minus)
        links = ", ".join(f"[{name}](#{anchor(EXPERIMENTS[name].title)})" for name in used)
        lines.append(
            f"| {letter} | {claim}. Runs: {links} | **{together(verdicts)}** | {'<br>'.join(parts)} |"
        )
    return "\n".join(lines)


def anchor(title: str) -> str:
    """Of the heading on the page, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def section(name: str, found: dict[str, dict]) -> str:
    """Command, hardware, time, and the table of an experiment, with the settings that it shares with others."""
    result, experiment = found[name], EXPERIMENTS[name]
    machine = (
        f"{', '.join(result['machines']) or 'unknown machine'}; torch {result['versions'].get('torch', '?')}"
    )
    logs = f"logs in [evidence/results/{name}](evidence/results/{name})"
    said = [
        f"`python -m evidence run {name} --data DIR --results OWN` ([recipe](evidence/recipes/{name}.args), {logs}); "
        f"{machine}; {result['hours']:g} hours of runs. Mean ± half of the 95 % interval over seeds."
    ]
    if result["missing"]:
        said.append(f"Not finished: {', '.join(result['missing'])}.")
    shared = {
        f"{setting} (runs of {a.experiment})": [run["figures"] for run in a.runs(found)]
        for setting, a in experiment.shared.items()
        if a.runs(found)
    }
    return (
        "\n".join(said) + "\n\n" + table(dict(sorted((rows_of(result) | shared).items())), experiment.columns)
    )


def blocks(found: dict[str, dict]) -> dict[str, str]:
    """{mark on the page: what belongs there}."""
    sections = {
        name: section(name, found)
        if name in found
        else f"No finished runs yet: `python -m evidence run {name} --data DIR` ([recipe](evidence/recipes/{name}.args))."
        for name in EXPERIMENTS
    }
    return {"checklist": checklist(found)} | sections


def filled(text: str, contents: dict[str, str]) -> str:
    """A page with what stands between <!-- NAME --> and <!-- end NAME --> written anew; ValueError names missing marks."""
    for name, content in contents.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"the page needs one place {begin.strip()} ... {end}, each on a line of its own")
        text = text[: text.index(begin)] + begin + content + "\n" + text[text.index(end) :]
    return text


def get_args_parser() -> Parser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("command", choices=["list", "run", "collect", "write"])
    p.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(EXPERIMENTS)}")
    p.add_argument("--data", default="", help="folder of the data sets' folders")
    p.add_argument("--runs", default="runs/evidence", help="where the runs are kept")
    p.add_argument("--results", default=os.path.join(HERE, "results"))
    p.add_argument("--page", default=os.path.join(ROOT, "RESULTS.md"))
    p.add_argument(
        "--missing", action="store_true", help="run only what evidence/results/NAME.json does not have"
    )
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
        found, launched = load(args.results), {}
        for name in args.names:
            words = launcher_words(
                name, args.data, args.runs, args.max_parallel, found.get(name), args.missing, more
            )
            if not words:
                print(f"{name}: evidence/results/{name}.json has all runs")
                continue
            launched[name] = words
            if "--dry_run" not in more:  # before hours of training, not after them
                path = os.path.join(args.results, f"{name}.json")
                check_same_flags(path, found.get(name), main_flags(words), shlex.join(recipe(name)))
        if failed := run_experiments(launched, args.max_parallel):
            print(f"failed: {', '.join(failed)}; the logs are named above", file=sys.stderr)
            return 1
        if "--dry_run" in more or "slurm" in more:
            return 0  # nothing to collect, or not yet
    if args.command in ("run", "collect"):
        refused = []
        for name in launched if args.command == "run" else args.names:
            try:
                collect_experiment(name, args.runs, args.results)
            except (ValueError, OSError) as e:  # the others are collected all the same
                refused.append(f"{name}: {e}")
        if refused:
            raise ValueError("\n".join(refused))
        return 0
    found = load(args.results)
    if args.command == "list":
        for name, e in EXPERIMENTS.items():
            print(
                f"{name:18} {e.title}: "
                + (f"{len(found[name]['runs'])} runs" if name in found else "not run")
            )
        for letter, (claim, contrasts) in CHECKLIST.items():
            print(f"{letter}  {together([c.verdict(found) for c in contrasts])}: {claim}")
        return 0
    with open(args.page) as f:
        text = filled(f.read(), blocks(found))
    with open(args.page, "w") as f:
        f.write(text)
    print(f"wrote {args.page}")
    return 0
