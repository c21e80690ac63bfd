"""What an experiment of several seeds says: its figures in one file, tables, and differences with their intervals.

An experiment is a sweep (util/report/runs.py) over `seed` and other flags. Differences are paired: runs with the same
seed share the order of their images and their crops, so that what these do drops out of the difference.
"""

import json
import os
import shlex
from dataclasses import dataclass, replace

from util.cluster.job import read_note
from util.report.runs import Aggregate, RunRecord, read_sweep

# Of a line of log.txt: how a run went, not what it found.
_NOT_FOUND = ("epoch", "train_lr", "train_grad_norm", "n_parameters", "data_wait", "mfu")


def rounded(x, digits: int = 6):
    return float(f"{x:.{digits}g}") if isinstance(x, float) else x


def collect(folder: str) -> dict:
    """{flags, runs: [{name, flags, figures}], missing, machines, versions, hours} of a sweep's folder.

    The first flags are those of all runs, in which results may differ from their recipe.

    `figures` are those of the last epoch, with those of the runs that follow as `finetune/test_acc1`; hours are the sum over
    all runs that say when they began. A run that its job.json does not call finished is missing. ValueError where there are
    no runs.
    """
    runs, _, missing = read_sweep(folder)
    missing += [run.name for run in runs if not _finished(run.folder)]
    runs = [run for run in runs if _finished(run.folder)]
    if not runs:
        raise ValueError(f"no run in {folder} is finished: there is nothing to collect")
    records = [json.loads(_read(os.path.join(run.folder, "run.json")) or "{}") for run in runs]
    plan = json.loads(_read(os.path.join(folder, "sweep.json")) or "{}")
    hours = [
        sum(_seconds(os.path.join(run.folder, sub)) for sub in ["", *_folders(run.folder)]) / 3600
        for run in runs
    ]
    return {
        "flags": as_noted(plan.get("flags", [])),
        "runs": [
            {"name": run.name, "flags": run.flags, "figures": figures_of(run), "hours": round(h, 4)}
            for run, h in zip(runs, hours)
        ],
        "missing": missing,
        "machines": sorted({device for record in records for device in record.get("devices", [])}),
        "versions": records[-1].get("versions", {}),
        "hours": round(sum(hours), 2),
    }


def as_noted(words: list[str]) -> str:
    """Flags but for where the data lie, which is no part of what was done."""
    return shlex.join(w for i, w in enumerate(words) if "--data_path" not in (w, words[i - 1] if i else ""))


def merged(before: dict, found: dict) -> dict:
    """Results with what earlier ones of the same flags have beyond them."""
    own = {run["name"] for run in found["runs"]}
    kept = [run for run in before["runs"] if run["name"] not in own]
    earlier = before["versions"] if kept else {}
    # Of runs that are collected again the hours count once.
    again = sum(run.get("hours", 0.0) for run in before["runs"] if run["name"] in own)
    return found | {
        "runs": sorted(kept + found["runs"], key=lambda run: run["name"]),
        "missing": [name for name in found["missing"] if name not in {run["name"] for run in kept}],
        "machines": sorted({*before["machines"], *found["machines"]}),
        "versions": {
            name: ", ".join(sorted({*earlier.get(name, version).split(", "), version}))
            for name, version in found["versions"].items()
        },
        "hours": round(found["hours"] + (before["hours"] - again if kept else 0.0), 2),
    }


def write_json(path: str, result: dict) -> None:
    """A line per run, so that a later run changes one line."""
    lines = [
        f" {json.dumps(key)}: "
        + ("[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]" if key == "runs" else json.dumps(value))
        for key, value in result.items()
    ]
    with open(path, "w") as f:
        f.write("{\n" + ",\n".join(lines) + "\n}\n")


def figures_of(run: RunRecord) -> dict[str, float]:
    """What the last epoch of a run says, and of each run that follows it."""
    last = {
        k: v
        for line in run.follow_ups
        for k, v in line.items()
        if _finished(os.path.join(run.folder, k.partition("/")[0]))
    } | run.log[-1]
    return {
        k: rounded(v)
        for k, v in last.items()
        if k.rpartition("/")[2] not in _NOT_FOUND and isinstance(v, (int, float))
    }


def _finished(folder: str) -> bool:
    """Runs that no launcher started say nothing about it, and count."""
    return read_note(folder).get("state", "finished") == "finished"


def _read(path: str) -> str:
    if not os.path.isfile(path):
        return ""
    with open(path) as f:
        return f.read()


def _folders(folder: str) -> list[str]:
    return [name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name, "log.txt"))]


def _seconds(folder: str) -> float:
    """From the first to the last sign of life of a run's last start; 0 where one is missing."""
    record, log = os.path.join(folder, "run.json"), os.path.join(folder, "log.txt")
    if not (os.path.isfile(record) and os.path.isfile(log)):
        return 0.0
    begun = os.path.getmtime(record)
    return max(0.0, os.path.getmtime(log) - begun)


def copy_logs(folder: str, out: str) -> None:
    """log.txt, rounded, and flags.json of each run of a sweep: small enough to be kept, and a sweep's folder by themselves."""
    for run in read_sweep(folder)[0]:
        if not _finished(run.folder):
            continue
        os.makedirs(os.path.join(out, run.name), exist_ok=True)
        with open(os.path.join(out, run.name, "log.txt"), "w") as f:
            f.writelines(json.dumps({k: rounded(v) for k, v in line.items()}) + "\n" for line in run.log)
        with open(os.path.join(out, run.name, "flags.json"), "w") as f:
            json.dump(run.flags, f)


@dataclass(frozen=True)
class At:
    """The runs of an experiment with these flags, one per seed."""

    experiment: str
    flags: tuple[tuple[str, object], ...] = ()

    def runs(self, results: dict[str, dict]) -> list[dict]:
        return [
            run
            for run in results.get(self.experiment, {}).get("runs", [])
            if all(run["flags"].get(k) == v for k, v in self.flags)
        ]

    def per_seed(self, results: dict[str, dict], metric: str) -> dict[int, float]:
        """{seed: figure}; empty where the experiment was not run. ValueError if the flags leave several runs of a seed."""
        found = {}
        for run in self.runs(results):
            if metric in run["figures"]:
                seed = run["flags"].get("seed", 0)
                if seed in found:
                    raise ValueError(
                        f"{self.experiment} has several runs of seed {seed} with {dict(self.flags)}"
                    )
                found[seed] = run["figures"][metric]
        return found


def at(experiment: str, **flags) -> At:
    return At(experiment, tuple(flags.items()))


@dataclass(frozen=True)
class Contrast:
    """sum(plus) - sum(minus) of a metric, seed by seed, which a claim expects to be above 0 or, with `margin`, within it."""

    what: str
    plus: tuple[At, ...]
    minus: tuple[At, ...]
    metric: str = "test_acc1"
    margin: float | None = None
    minus_metric: str = ""  # where the other side's figure has another name

    def turned(self) -> "Contrast":
        """minus - plus: for losses, of which less is better."""
        name = self.what.split(": ")
        return replace(
            self,
            what=f"{name[0]}: {self.metric}, " + " - ".join(reversed(name[1].split(" - "))),
            plus=self.minus,
            minus=self.plus,
        )

    def differences(self, results: dict[str, dict]) -> Aggregate:
        """One value per seed that all sides have; none where a side was not run."""
        sides = [
            [a.per_seed(results, metric) for a in side]
            for side, metric in ((self.plus, self.metric), (self.minus, self.minus_metric or self.metric))
        ]
        seeds = sorted(set.intersection(*(set(found) for side in sides for found in side)))
        return Aggregate(
            self.what, tuple(sum(f[s] for f in sides[0]) - sum(f[s] for f in sides[1]) for s in seeds)
        )

    def verdict(self, results: dict[str, dict]) -> str:
        """supported, contradicted or undecided by the 95 % interval of the mean difference; else not run."""
        found = self.differences(results)
        if len(found.values) < 2:
            return "not run" if not found.values else "one seed"
        low, high = found.mean - found.interval, found.mean + found.interval
        if self.margin is None:
            return "supported" if low > 0 else "contradicted" if high < 0 else "undecided"
        inside = -self.margin < low and high < self.margin
        outside = low > self.margin or high < -self.margin
        return "supported" if inside else "contradicted" if outside else "undecided"


def together(verdicts: list[str]) -> str:
    """Of a claim with several parts: the verdict that all of them have, else how many have which."""
    for word in ("contradicted", "not run", "one seed", "undecided"):
        if word in verdicts:
            parts = [f"{v} {verdicts.count(v)}" for v in dict.fromkeys(verdicts)]
            return word if len(set(verdicts)) == 1 else "mixed: " + ", ".join(parts)
    return "supported"


def plus_minus(found: Aggregate, digits: int = 2) -> str:
    if found.interval is None:
        return f"{found.mean:.{digits}f} (one seed)"
    return f"{found.mean:.{digits}f} ± {found.interval:.{digits}f}"


@dataclass(frozen=True)
class Column:
    """A figure in a table: its title, its name among a run's figures, and how it is written."""

    title: str
    metric: str
    factor: float = 1.0
    digits: int = 2


def rows_of(result: dict) -> dict[str, list[dict]]:
    """{setting: the figures of each seed}."""
    rows: dict[str, list[dict]] = {}
    for run in result["runs"]:
        setting = ", ".join(f"{k} {v}" for k, v in run["flags"].items() if k != "seed")
        rows.setdefault(setting or "all", []).append(run["figures"])
    return rows


def table(rows: dict[str, list[dict]], columns: tuple[Column, ...]) -> str:
    """A row per setting: mean ± half of the 95 % interval over seeds. Columns of which no run has a figure are left out."""
    known = set().union(*(figures for runs in rows.values() for figures in runs))
    columns = [c for c in columns if c.metric in known]
    lines = [
        "| setting | seeds | " + " | ".join(c.title for c in columns) + " |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for setting, runs in rows.items():
        cells = []
        for c in columns:
            values = tuple(c.factor * figures[c.metric] for figures in runs if c.metric in figures)
            cells.append(plus_minus(Aggregate(setting, values), c.digits) if values else "")
        lines.append(f"| {setting} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
