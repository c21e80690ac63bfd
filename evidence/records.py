"""The results of an experiment as files: its runs' last figures in NAME.json, and their logs.

An experiment is a sweep (util/report/runs.py) over `seed` and other flags. NAME.json has the keys
`flags` (those of all runs, in which they may differ from the recipe), `runs`, `missing`,
`machines`, `versions` and `hours`.
"""

import glob
import json
import os
import shlex
from collections.abc import Callable
from typing import Any

from evidence.experiments import recipe
from evidence.images import copy_counts, kept_counts
from util.cluster.job import read_note
from util.evaluate.segments.image_counts import FILE
from util.files.atomic import read_json, replacing, write_text
from util.files.names import printable
from util.report.runs import RunRecord, known_json, print_damage, read_plan, read_sweep, run_folders

# Keys of log.txt that describe the course of a run, not its results.
NOT_RESULTS = ("epoch", "train_lr", "train_grad_norm", "n_parameters", "data_wait", "mfu")

# The types of the entries of NAME.json.
RESULT: dict[str, Any] = {
    "flags": str,
    "recipe": str,
    "runs": list,
    "missing": list,
    "machines": list,
    "versions": dict,
    "hours": (int, float),
}


def collect(folder: str) -> dict:
    """The results of a sweep's folder: {flags, runs: [{name, flags, figures, hours}], missing, ...}.

    Figures are those of the last epoch; follow-up runs add theirs, such as `finetune/test_acc1`. A run that
    its launcher has not noted as finished is missing. Raises ValueError if no run is finished, or if
    sweep.json is damaged.
    """
    sweep = read_sweep(folder)
    runs = [run for run in sweep.runs if is_finished(run.folder)]
    unfinished = [run.name for run in sweep.runs if not is_finished(run.folder)]
    if not runs:
        raise ValueError(f"no run in {folder} is finished: there is nothing to collect")
    # Copied logs have no run.json.
    records = [known_json(os.path.join(run.folder, "run.json"), print_damage) for run in runs]
    # Without the plan, the results would have the wrong flags.
    plan = read_plan(folder)
    hours = [run_hours(run.folder) for run in runs]
    return {
        "flags": noted_flags(plan.get("flags", [])),
        "runs": [
            {"name": run.name, "flags": run.flags, "figures": figures_of(run), "hours": round(h, 4)}
            for run, h in zip(runs, hours)
        ],
        "missing": sweep.missing + unfinished,
        "machines": sorted({device for record in records for device in _devices(record)}),
        # Those of the last run; `merged` joins them with those of earlier collections.
        "versions": _versions(records[-1]),
        "hours": round(sum(hours), 2),
    }


def _devices(record: dict) -> list[str]:
    devices = record.get("devices", [])
    if not isinstance(devices, list):
        return []
    return [device for device in devices if isinstance(device, str)]


def _versions(record: dict) -> dict[str, str]:
    versions = record.get("versions", {})
    if not isinstance(versions, dict):
        return {}
    return {package: str(version) for package, version in versions.items()}


def collect_experiment(name: str, runs: str, results: str) -> None:
    """Write NAME.json and the logs of an experiment; earlier runs of the same flags are kept.

    Raises ValueError if no run is finished, or if the results hold runs of other flags.
    """
    folder = os.path.join(runs, name)
    path = os.path.join(results, f"{name}.json")
    result = {"experiment": name, "recipe": shlex.join(recipe(name))} | collect(folder)
    # Results of an earlier collection, perhaps from another machine.
    before = load_one(path)
    check_same_flags(path, before, result["flags"], result["recipe"])
    if before:
        result = merged(before, result)
    os.makedirs(results, exist_ok=True)
    write_json(path, result)
    copy_logs(folder, os.path.join(results, name))
    message = f"{name}: {len(result['runs'])} runs"
    if result["missing"]:
        message += f", missing: {', '.join(result['missing'])}"
    print(printable(message))


def load(results: str, report: Callable[[str], object] | None = None) -> dict[str, dict]:
    """{experiment: content of its NAME.json} of a folder of results.

    Raises ValueError for a damaged file. With `report`, such files are left out, and it gets the messages.
    """
    contents = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(results), "*.json"))):
        try:
            content = load_one(path)
        except (ValueError, OSError) as error:
            if report is None:
                raise
            report(str(error))
            continue
        if content is not None:
            contents[os.path.basename(path).removesuffix(".json")] = content
    return contents


def load_one(path: str) -> dict | None:
    """The content of a NAME.json, None if there is no such file. Raises ValueError if it is damaged."""
    try:
        content = read_json(path, dict)
    except FileNotFoundError:
        return None
    for key, kind in RESULT.items():
        if not isinstance(content.get(key), kind):
            raise ValueError(
                f"{path} is damaged, or of another program: it has no valid entry {key!r}. Restore it"
            )
    if not all(map(_is_run, content["runs"])):
        raise ValueError(f"{path} is damaged: not all its 'runs' have name, flags and figures. Restore it")
    if not all(isinstance(word, str) for word in content["missing"] + content["machines"]):
        raise ValueError(f"{path} is damaged: its 'missing' and 'machines' are no names. Restore it")
    return content


def _is_run(run: object) -> bool:
    if not isinstance(run, dict) or not isinstance(run.get("name"), str):
        return False
    flags = run.get("flags")
    figures = run.get("figures")
    if not isinstance(flags, dict) or not isinstance(figures, dict):
        return False
    return all(isinstance(value, (int, float)) for value in [run.get("hours", 0), *figures.values()])


def noted_flags(words: list[str]) -> str:
    """Flags without --data_path: the place of the data is not part of the experiment."""
    # The flag and its value are two words.
    flags = []
    previous = ""
    for word in words:
        if "--data_path" not in (word, previous):
            flags.append(word)
        previous = word
    return shlex.join(flags)


def merged(before: dict, new: dict) -> dict:
    """New results, and earlier runs of the same flags that they do not have."""
    # Runs of the same name are the same setting and seed; the new ones win.
    names = {run["name"] for run in new["runs"]}
    earlier = [run for run in before["runs"] if run["name"] not in names]
    earlier_names = {run["name"] for run in earlier}
    earlier_versions: dict[str, str] = {}
    hours = new["hours"]
    if earlier:
        earlier_versions = before["versions"]
        # The hours of runs that are collected again count once.
        again = sum(run.get("hours", 0.0) for run in before["runs"] if run["name"] in names)
        hours += before["hours"] - again
    return new | {
        # By name, so that files differ only in what is new.
        "runs": sorted(earlier + new["runs"], key=lambda run: run["name"]),
        "missing": [name for name in new["missing"] if name not in earlier_names],
        "machines": sorted({*before["machines"], *new["machines"]}),
        "versions": {
            package: _joined(earlier_versions.get(package, version), version)
            for package, version in new["versions"].items()
        },
        "hours": round(hours, 2),
    }


def _joined(versions: str, version: str) -> str:
    # Versions of several collections are one text, such as "2.14.1, 2.15.0".
    return ", ".join(sorted({*versions.split(", "), version}))


def check_same_flags(path: str, before: dict | None, flags: str, recipe: str) -> None:
    """Raise ValueError if the results in `path` are of other flags, naming the flags that differ.

    Merging them would mix two trainings in one table, and overwriting them would lose the earlier runs.
    """
    if not before:
        return
    if before["flags"] == flags and without_seeds(before["recipe"]) == without_seeds(recipe):
        return
    old = _flag_words(before["flags"], before["recipe"])
    new = _flag_words(flags, recipe)
    raise ValueError(
        f"{path} has {len(before['runs'])} runs of other flags (only in the file: {_but(old, new)}; "
        f"only in this run: {_but(new, old)}): choose another folder "
        "as `results`, or give the flags of the file after --, or delete it and the logs in "
        f"{path.removesuffix('.json')}"
    )


def without_seeds(recipe: str) -> list[str]:
    """A recipe without its seeds: adding seeds does not change the training of earlier runs."""
    return [word for word in shlex.split(recipe) if not word.startswith("seed=")]


def _flag_words(flags: str, recipe: str) -> list[str]:
    """Each flag with its values, without the dashes."""
    return f" {flags} {shlex.join(without_seeds(recipe))}".split(" --")[1:]


def _but(flags: list[str], others: list[str]) -> str:
    return " ".join(f"--{flag}" for flag in dict.fromkeys(flags) if flag not in others) or "nothing"


def write_json(path: str, result: dict) -> None:
    """Write a result with one line per run, so that a new run changes one line of the file."""
    # json.dump has one indentation for all levels: one line, or a line for each number.
    lines = []
    for key, value in result.items():
        text = json.dumps(value)
        if key == "runs":
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    with replacing(path) as f:
        f.write("{\n" + ",\n".join(lines) + "\n}\n")


def rounded(value: Any, digits: int = 6) -> Any:
    """A float with so many significant digits; any other value as it is."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.{digits}g}")


def figures_of(run: RunRecord) -> dict[str, float]:
    """The figures of a run's last epoch, and of each finished follow-up run."""
    last = {}
    for line in run.follow_ups:
        for key, value in line.items():
            if is_finished(os.path.join(run.folder, key.partition("/")[0])):
                last[key] = value
    # The run itself last: its own names have no slash, so nothing is overwritten.
    last |= run.log[-1]
    return {
        key: rounded(value)
        for key, value in last.items()
        if key.rpartition("/")[2] not in NOT_RESULTS and isinstance(value, (int, float))
    }


def is_finished(folder: str) -> bool:
    """Whether the launcher noted the run as finished."""
    # A run that was started without the launcher has no note, and counts as finished.
    try:
        return read_note(folder).get("state", "finished") == "finished"
    except (ValueError, OSError) as error:
        print_damage(str(error))
        return False


def run_hours(folder: str) -> float:
    """Hours of a run and of its follow-up runs."""
    folders = [folder, *(os.path.join(folder, name) for name in run_folders(folder))]
    return sum(map(_seconds, folders)) / 3600


def _seconds(folder: str) -> float:
    """Seconds from the last start of a run to its last line of log.txt; 0 if a file is missing."""
    record = os.path.join(folder, "run.json")
    log = os.path.join(folder, "log.txt")
    if not (os.path.isfile(record) and os.path.isfile(log)):
        return 0.0
    # run.json is written at each start, log.txt at each epoch's end. Copied files may have any times.
    return max(0.0, os.path.getmtime(log) - os.path.getmtime(record))


def copy_logs(folder: str, out: str) -> None:
    """Copy log.txt, rounded, and flags.json of each finished run: a small sweep folder of its own.

    Counts of images that a follow-up run has written are copied as well.
    """
    for run in read_sweep(folder).runs:
        if not is_finished(run.folder):
            continue
        copy = os.path.join(out, run.name)
        os.makedirs(copy, exist_ok=True)
        with replacing(os.path.join(copy, "log.txt")) as f:
            for line in run.log:
                f.write(json.dumps({key: rounded(value) for key, value in line.items()}) + "\n")
        write_text(os.path.join(copy, "flags.json"), json.dumps(run.flags))
        for follow_up in run_folders(run.folder):
            counts = os.path.join(run.folder, follow_up, FILE)
            if os.path.isfile(counts):
                copy_counts(counts, kept_counts(out, run.name, follow_up))
