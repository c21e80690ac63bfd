"""Runs and sweeps as they are on disk: their flags, and one line of figures per epoch.

A run is a folder with a log.txt. Follow-up runs are in its subfolders, and their figures are named
`finetune/test_acc1`. A sweep is a folder of runs. Its file sweep.json lists the planned runs, and the
flags.json of each run has the values of the swept flags. If these files are missing, the flags stored in the
runs' checkpoints are compared.

Damaged files, and those of other programs, are named. They do not keep the other runs from being read.
"""

import functools
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from util.files import LAST_CHECKPOINT
from util.files.atomic import read_json
from util.files.names import one_line, printable

# More flags than this are not a sweep, unless a file says so.
MOST_SWEPT = 4
# Flags of places and of bookkeeping: two runs that differ in these alone have the same settings.
NEVER_SWEPT = {
    "data_path",
    "output_dir",
    "log_dir",
    "resume",
    "device",
    "num_workers",
    "data_timeout",
    "data_cache",
    "local_rank",
    "print_freq",
    "predictions",
    "save_every_epochs",
    "save_minutes",
    "save_steps",
    "keep",
    "picture_epochs",
}
# Figures to show by default, the most telling first.
PREFERRED = (
    "finetune/test_acc1",
    "linprobe/test_acc1",
    "segment/test_miou",
    "test_acc1",
    "test_miou",
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
    """One run: the name of its folder, its flags, and log.txt as one dictionary per epoch.

    In a sweep, `flags` are the swept ones only, and all runs that differ by their seed alone have the same
    `point`. `follow_ups` are the log lines of follow-up runs, each figure prefixed by its folder.
    """

    name: str
    folder: str
    flags: dict
    log: list[dict]
    point: str = ""
    follow_ups: list[dict] = field(default_factory=list)

    def last(self, metric: str) -> float | None:
        """The metric in the last epoch that logged it, None if no epoch did."""
        # Follow-up runs have prefixed names, so that the order of the two lists does not matter.
        lines = reversed(self.follow_ups + self.log)
        return next((line[metric] for line in lines if metric in line), None)


class Sweep(NamedTuple):
    """The runs of a sweep, the swept flags, and the planned runs that have no figures yet."""

    runs: list[RunRecord]
    swept: list[str]
    missing: list[str]


# Takes the message about a damaged file.
Report = Callable[[str], object]


@functools.cache
def print_damage(message: str) -> None:
    """Print a message about a damaged file as one line on stderr, once."""
    print(f"warning: {printable(message)}", file=sys.stderr, flush=True)


def read_run(folder: str, name: str = "", report: Report = print_damage) -> RunRecord:
    """Read a run. Raises ValueError if the folder has no log.txt with at least one epoch.

    Damaged lines and files are left out, and their names go to `report`.
    """
    path = os.path.join(folder, "log.txt")
    if not os.path.isfile(path):
        if os.path.isfile(os.path.join(folder, "run.json")):
            raise ValueError(f"{folder} has no log.txt: the run has not finished an epoch yet")
        raise ValueError(
            f"{folder} has no log.txt: give the `output_dir` of a run, or a folder of such folders"
        )
    log = log_lines(path, report)
    if not log:
        what = "has no complete line"
        if not os.path.getsize(path):
            what = "is empty"
        raise ValueError(f"{path} {what}: the run has not finished an epoch yet")
    # normpath drops a slash at the end.
    name = name or os.path.basename(os.path.normpath(folder))
    return RunRecord(name, folder, _flags(folder, report), log, name, _follow_ups(folder, report))


def _follow_ups(folder: str, report: Report) -> list[dict]:
    lines = []
    for subfolder in run_folders(folder):
        for line in log_lines(os.path.join(folder, subfolder, "log.txt"), report):
            lines.append({f"{subfolder}/{key}": value for key, value in line.items()})
    return lines


def log_lines(path: str, report: Report = print_damage) -> list[dict]:
    """Read the lines of a log.txt, each {"epoch": from 0, name: number}. Damaged lines are left out."""
    lines = []
    damaged: list[str] = []
    # A damaged file may hold any bytes.
    with open(path, encoding="utf-8", errors="replace") as f:
        for number, text in enumerate(f, start=1):
            try:
                lines.append(_figures(text))
            except ValueError as error:
                # The last line is incomplete while a run writes it, or if the run was killed then.
                if text.endswith("\n") and text.strip():
                    damaged.append(f"line {number}: {error}")
    if damaged:
        report(f"{path} has damaged lines, which are left out ({len(damaged)}, the first is {damaged[0]})")
    return lines


def _figures(text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(line, dict):
        raise ValueError(f"it is a {type(line).__name__}, not an object of figures")
    for name, value in line.items():
        if not _is_figure(value):
            raise ValueError(f"`{name}` is not a number")
    epoch = line.get("epoch")
    if not isinstance(epoch, int) or not 0 <= epoch < 10**9:
        raise ValueError("it has no number of an epoch")
    return line


def _is_figure(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    # Those of a diverged run may be nan or infinite. Larger numbers than those of float32 have no square.
    return -1e100 < value < 1e100 or (isinstance(value, float) and not math.isfinite(value))


def known_json(path: str, report: Report) -> dict:
    """The dictionary in a JSON file, {} if there is no such file or if it is damaged."""
    if not os.path.lexists(path):
        return {}
    try:
        return read_json(path, dict)
    except (ValueError, OSError) as error:
        report(str(error))
        return {}


def _flags(folder: str, report: Report) -> dict:
    """The flags of a run: the swept ones if noted, else those in run.json, else those in its checkpoint."""
    path = os.path.join(folder, "flags.json")
    if os.path.isfile(path):
        return known_json(path, report)
    path = os.path.join(folder, "run.json")
    if os.path.isfile(path):
        note = known_json(path, report)
        flags = note.get("flags", note)
        if not isinstance(flags, dict):
            report(f"{path} is damaged: its `flags` is a {type(flags).__name__}, not a dict")
            return {}
        return flags
    path = os.path.join(folder, LAST_CHECKPOINT)
    if not os.path.isfile(path):
        return {}
    # Imported here because torch takes seconds to import, and most folders have one of the files above.
    from util.weights.files import load

    try:
        stored = load(path).args
    except (ValueError, OSError) as error:
        report(str(error))
        return {}
    return {name: value for name, value in stored.items() if isinstance(name, str)}


def read_plan(folder: str | os.PathLike) -> dict[str, Any]:
    """Read sweep.json, {} if there is none: `sweep` has the values of each flag, `points` name and flags.

    Raises ValueError, which names the file, if it is damaged or not that of a launcher.
    """
    path = os.path.join(folder, "sweep.json")
    try:
        plan = read_json(path, dict)
    except FileNotFoundError:
        return {}
    points = plan.get("points")
    if not isinstance(points, list) or not all(map(_is_point, points)):
        raise ValueError(
            f"{path} has no list `points` of runs with their flags: it is damaged, or the file of another "
            "program. Restore it, or remove it"
        )
    if not isinstance(plan.get("sweep", {}), dict):
        raise ValueError(f"{path} is damaged: its `sweep` is not a dict. Restore it, or remove it")
    return plan


def _is_point(point: object) -> bool:
    if not isinstance(point, dict) or not isinstance(point.get("flags"), dict):
        return False
    return is_run_name(point.get("name"))


def is_run_name(name: object) -> bool:
    """Whether a name can be that of a run below a folder. It must neither leave the folder nor hide text."""
    if not isinstance(name, str) or one_line(name) != name:
        return False
    return not os.path.isabs(name) and ".." not in name.split("/")


def run_folders(folder: str) -> list[str]:
    """The sorted names of all subfolders that are runs."""
    if not os.path.isdir(folder):
        return []
    return [n for n in sorted(os.listdir(folder)) if os.path.isfile(os.path.join(folder, n, "log.txt"))]


def is_sweep(folder: str) -> bool:
    """Whether a folder holds runs and is not a run itself."""
    return not os.path.isfile(os.path.join(folder, "log.txt")) and bool(run_folders(folder))


def read_sweep(folder: str, report: Report = print_damage) -> Sweep:
    """Read all runs of a sweep. Raises ValueError if the folder holds no runs with figures.

    If no file says what was swept, all flags that differ between runs count as swept. If they are more than
    MOST_SWEPT, the runs are probably unrelated: the only swept flag is then `run`, the run's name. Runs and
    files that cannot be read are left out, and their names go to `report`.
    """
    runs = _readable_runs(folder, report)
    plan = _known_plan(folder, report)
    planned = {point["name"]: point["flags"] for point in plan.get("points", [])}
    # If its own file is damaged, a run has the flags that were planned.
    runs = [replace(run, flags=run.flags or planned.get(run.name, {})) for run in runs]
    swept = _planned_flags(plan)
    if not swept:
        swept = _differing_flags(runs)
        noted = any(os.path.isfile(os.path.join(run.folder, "flags.json")) for run in runs)
        # A table of unrelated runs would have dozens of columns, and their names tell more.
        if len(swept) > MOST_SWEPT and not noted:
            return Sweep([replace(run, flags={"run": run.name}) for run in runs], ["run"], [])
    sweep_name = os.path.basename(os.path.normpath(folder))
    runs = [_with_swept_flags(run, swept, sweep_name) for run in runs]
    names = {run.name for run in runs}
    missing = [name for name in planned if name not in names]
    return Sweep(runs, swept, missing)


def _known_plan(folder: str, report: Report) -> dict:
    # Written by the launcher; folders that were put together by hand have none.
    try:
        return read_plan(folder)
    except (ValueError, OSError) as error:
        report(str(error))
        return {}


def _readable_runs(folder: str, report: Report) -> list[RunRecord]:
    names = run_folders(folder)
    if not names:
        raise ValueError(f"{folder} holds no runs: a sweep is a folder of folders with a log.txt each")
    runs = []
    for name in names:
        try:
            runs.append(read_run(os.path.join(folder, name), report=report))
        except (ValueError, OSError) as error:
            report(str(error))
    if not runs:
        raise ValueError(f"{folder} holds no run with figures yet")
    return runs


def _planned_flags(plan: dict) -> list[str]:
    """The swept flags of a sweep.json, in its order; `hflip+vflip` are two flags that were swept together."""
    flags = [flag for joint in plan.get("sweep", {}) for flag in joint.split("+")]
    for point in plan.get("points", []):
        flags += point["flags"]
    return list(dict.fromkeys(flags))


def _differing_flags(runs: list[RunRecord]) -> list[str]:
    flags = sorted(set().union(*(run.flags for run in runs)) - NEVER_SWEPT)
    # As text, because values may be lists, which have no hash.
    return [flag for flag in flags if len({str(run.flags.get(flag)) for run in runs}) > 1]


def _with_swept_flags(run: RunRecord, swept: list[str], sweep_name: str) -> RunRecord:
    """Reduce a run's flags to the swept ones, and name the point that it shares with other seeds."""
    flags = {flag: run.flags[flag] for flag in swept if flag in run.flags}
    point = setting_name(flags, "seed")
    if not point and "seed" in flags:
        # Only seeds differ: the whole sweep is one point.
        point = sweep_name
    return replace(run, flags=flags, point=point or run.name)


def setting_name(flags: dict, *without: str) -> str:
    """Flags in words, such as `pos_embed none, pos_label apl`, without those named."""
    return ", ".join(f"{flag} {value}" for flag, value in sorted(flags.items()) if flag not in without)


def metrics_of(runs: list[RunRecord], requested: list[str] | None = None) -> list[str]:
    """The metrics to show: the requested ones, else up to three of PREFERRED.

    Raises ValueError if no run has a requested metric; the message lists all metrics.
    """
    metrics = {key for run in runs for line in run.log + run.follow_ups for key in line}
    for metric in requested or []:
        if metric not in metrics:
            raise ValueError(f"no run has a metric {metric}; the metrics are {', '.join(sorted(metrics))}")
    if requested:
        return requested
    # Up to three, as each is a chart of its own. A training figure is left out if the same figure of
    # validation is there.
    superseded = {metric.replace("test_", "train_") for metric in metrics if "test_" in metric}
    return [metric for metric in PREFERRED if metric in metrics - superseded][:3]
