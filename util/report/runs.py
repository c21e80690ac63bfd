"""What finished runs and sweeps left on the disk: flags, a line of figures per epoch, and the seeds of a point together.

A run is a folder with log.txt; runs that follow it lie in it, and their figures are named `finetune/test_acc1`. A sweep is
a folder of runs; each may have flags.json, {flag: value} of what was swept,
and the folder sweep.json. Where these are missing, the flags stored in the runs' checkpoints are compared.
"""

import json
import os
from dataclasses import dataclass, field, replace

# Two-sided 95 % quantile of Student's t for 1, 2, ... degrees of freedom.
_T95 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)
MOST_SWEPT = 4
_PLACES = {
    "data_path",
    "output_dir",
    "log_dir",
    "resume",
    "device",
    "num_workers",
    "local_rank",
    "print_freq",
    "predictions",
    "save_every_epochs",
    "save_minutes",
    "save_steps",
    "keep",
    "picture_epochs",
}  # never what is swept
PREFERRED = (
    "finetune/test_acc1",
    "linprobe/test_acc1",
    "test_acc1",
    "test_position",
    "test_position_acc",
    "test_pixel",
    "knn20_cls",
    "knn20_avg",
    "train_position",
    "train_position_acc",
    "train_pixel",
    "train_loss",
)


@dataclass(frozen=True)
class RunRecord:
    """One run: its folder's name, the flags that matter here, and log.txt as dictionaries, one per epoch."""

    name: str
    folder: str
    flags: dict
    log: list[dict]
    point: str = ""  # what runs that differ by their seed alone have in common
    follow_ups: list[dict] = field(
        default_factory=list
    )  # lines of the runs that follow it, names with their folder's

    def last(self, metric: str) -> float | None:
        """The metric in the last epoch that has it."""
        return next((line[metric] for line in reversed(self.follow_ups + self.log) if metric in line), None)


def read_run(folder: str, name: str = "") -> RunRecord:
    """ValueError where a folder has no log.txt with at least one epoch."""
    path = os.path.join(folder, "log.txt")
    if not os.path.isfile(path):
        raise ValueError(
            f"{folder} has no log.txt: give the --output_dir of a run, or a folder of such folders"
        )
    log = _lines(path)
    if not log:
        raise ValueError(f"{path} is empty: no epoch is finished yet")
    name = name or os.path.basename(os.path.normpath(folder))
    after = [
        {f"{sub}/{k}": v for k, v in line.items()}
        for sub in _subruns(folder)
        for line in _lines(os.path.join(folder, sub, "log.txt"))
    ]
    return RunRecord(name, folder, _flags(folder), log, name, after)


def _lines(path):
    out = []
    with open(path) as f:
        for line in f:
            try:
                out.append(json.loads(line))
            except json.JSONDecodeError:  # the line that a run is writing, or was when it was killed
                continue
    return out


def _flags(folder):
    """The first that is there: what was swept, what the run noted, what its checkpoint stores."""
    for name in ("flags.json", "run.json"):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            with open(path) as f:
                found = json.load(f)
            return found.get("flags", found) if name == "run.json" else found
    path = os.path.join(folder, "checkpoint-last.pth")
    if not os.path.isfile(path):
        return {}
    from util.weights.files import load  # torch takes seconds to import

    return load(path).args


def is_sweep(folder: str) -> bool:
    """Whether a folder holds runs rather than being one."""
    return not os.path.isfile(os.path.join(folder, "log.txt")) and bool(_subruns(folder))


def _subruns(folder):
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [n for n in names if os.path.isfile(os.path.join(folder, n, "log.txt"))]


def read_sweep(folder: str) -> tuple[list[RunRecord], list[str], list[str]]:
    """(runs with the swept flags only, the names of these flags, names of points that have no figures yet).

    Where nothing says what was swept and more than MOST_SWEPT flags differ, the one flag is `run`, the folder's name.
    """
    runs = [read_run(os.path.join(folder, name)) for name in _subruns(folder)]
    if not runs:
        raise ValueError(f"{folder} holds no runs: a sweep is a folder of folders with a log.txt each")
    path, planned, swept = os.path.join(folder, "sweep.json"), [], []
    if os.path.isfile(path):
        with open(path) as f:
            plan = json.load(f)
        planned = [point["name"] for point in plan.get("points", [])]
        names = [flag for together in plan.get("sweep", {}) for flag in together.split("+")]
        swept = list(dict.fromkeys([*names, *(k for p in plan.get("points", []) for k in p["flags"])]))
    if not swept:
        known = sorted(set().union(*(run.flags for run in runs)) - _PLACES)
        swept = [k for k in known if len({str(run.flags.get(k)) for run in runs}) > 1]
        noted = any(os.path.isfile(os.path.join(run.folder, "flags.json")) for run in runs)
        if (
            len(swept) > MOST_SWEPT and not noted
        ):  # runs that happen to lie together: their names say more than 40 flags
            return [replace(run, flags={"run": run.name}) for run in runs], ["run"], []
    own = [{k: r.flags[k] for k in swept if k in r.flags} for r in runs]
    alone = os.path.basename(os.path.normpath(folder))  # where seeds are all that differs
    runs = [
        replace(r, flags=f, point=_others(f, "seed") or (alone if "seed" in f else r.name))
        for r, f in zip(runs, own)
    ]
    return runs, swept, [name for name in planned if name not in {r.name for r in runs}]


@dataclass(frozen=True)
class Aggregate:
    """A metric at one value of a flag: every seed's figure, and what they say together."""

    x: object
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def interval(self) -> float | None:
        """Half of the 95 % interval of the mean (Student's t); None for a single seed."""
        n = len(self.values)
        if n < 2:
            return None
        variance = sum((v - self.mean) ** 2 for v in self.values) / (n - 1)
        t = _T95[n - 2] if n - 2 < len(_T95) else 1.96 + 2.6 / (n - 1)
        return t * (variance / n) ** 0.5


def aggregate(runs: list[RunRecord], flag: str, metric: str) -> dict[str, list[Aggregate]]:
    """{values of the other swept flags: a row per value of `flag`, sorted}; runs that differ by seed alone join."""
    groups: dict[str, dict] = {}
    for run in runs:
        value = run.last(metric)
        if value is None or flag not in run.flags:
            continue
        others = _others(run.flags, flag, "seed")
        groups.setdefault(others, {}).setdefault(_hashable(run.flags[flag]), []).append(value)
    return {
        others: [
            Aggregate(x, tuple(values)) for x, values in sorted(rows.items(), key=lambda row: _order(row[0]))
        ]
        for others, rows in sorted(groups.items())
    }


def _others(flags, *without):
    return ", ".join(f"{k} {v}" for k, v in sorted(flags.items()) if k not in without)


def _hashable(value):
    return tuple(value) if isinstance(value, list) else value


def _order(x):
    return (0, x, "") if isinstance(x, (int, float)) else (1, 0, str(x))


def metrics_of(runs: list[RunRecord], asked: list[str] | None = None) -> list[str]:
    """The metrics to show: those asked for (ValueError names what there is), else up to three usual ones."""
    known = sorted({k for run in runs for line in run.log + run.follow_ups for k in line})
    for metric in asked or []:
        if metric not in known:
            raise ValueError(f"no run has a metric {metric}; there are {', '.join(known)}")
    if asked:
        return asked
    usual = [m for m in PREFERRED if m in known]
    return [
        m for m in usual if m.replace("train_", "test_") == m or m.replace("train_", "test_") not in known
    ][:3]


def sweep_table(groups: dict[str, list[Aggregate]], flag: str, metric: str, chance: float | None) -> str:
    """The figures as a Markdown table: mean, all seeds, 95 % interval."""
    title = metric + (f" (chance {chance:.4f})" if chance is not None else "")
    many = len(groups) > 1
    head = ["others"] * many + [flag, title, "95 % interval", "each seed"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for others, rows in groups.items():
        for row in rows:
            half = "one seed" if row.interval is None else f"± {row.interval:.4f}"
            cells = [others] * many + [
                str(row.x),
                f"{row.mean:.4f}",
                half,
                ", ".join(f"{v:.4f}" for v in row.values),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
