"""Experiments given to the launcher of sweeps (util/cluster/launch.py), which also trains on this machine."""

import os

from evidence.experiments import EXPERIMENTS, recipe
from evidence.records import noted_flags
from util.files.cores import own_cores
from util.flags.parser import Parser

# util.cluster.launch is imported inside of the functions that need it: with torch, it takes seconds.


def missing_points(name: str, before: dict | None) -> list[str]:
    """The names of an experiment's runs that its results `before` do not have."""
    from util.cluster.sweep import plan

    done = {run["name"] for run in (before or {}).get("runs", [])}
    flags, sweep, _ = _parts(name)
    # The folder of the runs is not part of their names.
    points = plan(EXPERIMENTS[name].main, flags, sweep, [], "runs")
    return [point.name for point in points if point.name not in done]


def launcher_words(name: str, data: str, runs: str, max_parallel: int, extra: list[str]) -> list[str]:
    """The launcher's command line for an experiment: its recipe, the folders, and `extra` words, which
    win.
    """
    flags, sweep, then = _parts(name)
    # Follow-up runs may read another data set: {data} is the folder that holds all of them.
    then = [word.replace("{data}", data) for word in then]
    folders = [
        "--job_dir",
        os.path.join(runs, name),
        "--data_path",
        os.path.join(data, EXPERIMENTS[name].data),
    ]
    # Later words win, so that `extra` can choose another cluster.
    local = ["--cluster", "local", "--max_parallel", str(max_parallel)]
    return [*flags, "--sweep", *sweep, *local, *folders, *extra, *then]


def _parts(name: str) -> tuple[list[str], list[str], list[str]]:
    """A recipe's flags, the words of its --sweep, and its follow-up runs from the first --then on."""
    words = recipe(name)
    sweep = words.index("--sweep")
    then = len(words)
    if "--then" in words:
        then = words.index("--then")
    return words[:sweep], words[sweep + 1 : then], words[then:]


def main_flags(words: list[str]) -> str:
    """The flags of the main in the launcher's command line, as results note them."""
    from util.cluster.launch import add_cluster_flags, with_chain

    # What the launcher's parser does not know goes to the main.
    cluster = Parser(add_help=False)
    add_cluster_flags(cluster)
    words, _ = with_chain(words)
    _, flags = cluster.parse_known_args(words)
    return noted_flags(flags)


def run_experiments(command_lines: dict[str, list[str]], max_parallel: int) -> list[str]:
    """Run {experiment: launcher's words} one after the other. Returns the names of those that failed."""
    from util.cluster.launch import launch

    # Parallel runs share the cores of the CPU: with more threads than cores, they are slower
    # than serial ones.
    threads = max(1, own_cores() // max_parallel)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    return [name for name, words in command_lines.items() if launch(EXPERIMENTS[name].main, words) != 0]
