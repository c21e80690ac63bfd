"""SIGKILL at any moment of a training, again and again: no file is cut or lost, and the end is the same.

A run is killed at a drawn time, or before or after a drawn operation on files, and started again until it has
ended. Its folder then equals that of a run without a kill: the same files, the same bits, the same log.
"""

import builtins
import errno
import io
import json
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from attacks.children import Begin, Limits, Outcome, judge
from attacks.runs import MAINS, make_data, start, train, wait
from recorded_runs import CLOCK, PATHS, flat
from util.weights.files import load

EPOCHS = 3
FLAGS = ("--epochs", EPOCHS, "--save_steps", 1)
KILLS = 4  # of one input, which is a run, or several if a run ends before its kill
MOST_RUNS = 10
LIMITS = Limits(cpu=60, wall=300, memory_mb=1000)
# Operations on files, as (module, name), that a kill may precede or follow.
OPERATIONS: tuple[tuple[Any, str], ...] = (
    (os, "replace"),
    (os, "rename"),
    (os, "link"),
    (os, "remove"),
    (os, "unlink"),
    (os, "truncate"),
    (os, "fsync"),
    (os, "mkdir"),
    (builtins, "open"),
    (io, "open"),
)
# Files whose content differs between runs: times, process numbers, paths.
OTHER = re.compile(r"events\.out|\.owner\.json|run\.json|\.partial")


class Operations:
    """Counts operations on files in `folder`, and kills this process before or after one of them.

    `target` is (name, number, "before" or "after"). Without hard links `os.link` fails, as on some disks.
    """

    def __init__(self, folder: Path, target: tuple[str, int, str] | None = None, links: bool = True):
        self.folder = str(folder)
        self.target = target
        self.seen: Counter[str] = Counter()
        for module, name in OPERATIONS:
            plain = getattr(module, name)
            if name == "link" and not links:
                plain = no_link
            setattr(module, name, self._counting(name, plain))

    def _counting(self, name: str, plain: Callable) -> Callable:
        def counted(*arguments: Any, **options: Any) -> Any:
            paths = [os.fsdecode(x) for x in arguments[:2] if isinstance(x, (str, bytes, os.PathLike))]
            # fsync takes a descriptor.
            if name != "fsync" and not any(path.startswith(self.folder) for path in paths):
                return plain(*arguments, **options)
            self.seen[name] += 1
            here = name, self.seen[name]
            self._kill_at(*here, "before")
            try:
                return plain(*arguments, **options)
            finally:
                self._kill_at(*here, "after")

        return counted

    def _kill_at(self, *here: Any) -> None:
        if here == self.target:
            os.kill(os.getpid(), signal.SIGKILL)


def no_link(*arguments: Any, **options: Any) -> None:
    raise OSError(errno.EPERM, "no hard links here")


class Reference:
    """A run without a kill: its files, its duration, and its operations on files."""

    def __init__(self, kind: str, root: Path):
        self.kind = kind
        self.data = root / "data"
        folder = root / f"reference of {kind}"
        counts = root / f"{kind}.json"

        def call() -> int:
            operations = Operations(folder)
            code = train(kind, self.data, *FLAGS, "--output_dir", folder)
            counts.write_text(json.dumps(operations.seen))
            return code

        begin = time.monotonic()
        log = root / f"{kind}.log"
        if wait(start(log, call)) != 0:
            raise RuntimeError(f"the run without a kill failed:\n{log.read_text()[-3000:]}")
        self.seconds = time.monotonic() - begin
        self.operations: dict[str, int] = json.loads(counts.read_text())
        self.record = record(folder)


class Run:
    """A run that is killed and continued."""

    def __init__(self, reference: Reference, folder: Path, draw: random.Random, outcome: Outcome):
        self.reference = reference
        self.folder = folder
        self.draw = draw
        self.outcome = outcome
        self.log = folder.with_suffix(".log")
        self.links = draw.random() < 0.7
        self.kept: set[str] = set()  # checkpoints that were there after the kill before

    def start(self, target: tuple[str, int, str] | None = None) -> int:
        def call() -> int:
            Operations(self.folder, target, self.links)
            return train(self.reference.kind, self.reference.data, *FLAGS, "--output_dir", self.folder)

        return start(self.log, call)

    def kill(self, aimed: bool) -> bool:
        """Start or continue the run and kill it; return False if it ended before."""
        if aimed:
            # Each operation as often as any other, however rare it is.
            name = self.draw.choice(sorted(self.reference.operations))
            number = self.draw.randint(1, self.reference.operations[name])
            target = name, number, self.draw.choice(["before", "after"])
            code = wait(self.start(target))
            what = f"{target[2]} {name} number {number}"
        else:
            seconds = self.draw.uniform(0.05, 1) * self.reference.seconds
            pid = self.start()
            time.sleep(seconds)
            os.kill(pid, signal.SIGKILL)
            code = wait(pid)
            what = f"after {seconds:.2f} s"
        if code == -signal.SIGKILL:
            self.outcome.what += f"; killed {what}"
            self.outcome.kills += 1
            self.check_whole(what)
            return True
        if code != 0:
            self.outcome.fail("not continued", f"exit code {code}: {self._printed()}")
        return False

    def end(self) -> None:
        """Let the run end, and compare what it leaves with the reference."""
        code = wait(self.start())
        if code != 0:
            self.outcome.fail("not continued", f"exit code {code}: {self._printed()}")
            return
        self.check_whole("after the end")
        expected = self.reference.record
        found = record(self.folder)
        for name in sorted(expected.keys() | found.keys()):
            if name not in found:
                self.outcome.fail("a file is lost", name)
            elif name not in expected:
                self.outcome.fail("a file too many", name)
            elif expected[name] != found[name]:
                self.outcome.fail("another result", f"{name}: {difference(expected[name], found[name])}")
        if not self.outcome.failures:
            self.outcome.verdict = "the same end"

    def _printed(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return " | ".join(line for line in lines[-6:] if not line.startswith("Epoch"))

    def check_whole(self, when: str) -> None:
        """Every file that has its final name is whole, and no checkpoint is gone."""
        epochs = self._check_log(when)
        for path in self.folder.glob("*.json"):
            try:
                json.loads(path.read_text())
            except ValueError as error:
                self.outcome.fail("a damaged file", f"{when}: {path.name}: {error}")
        found = {}
        for path in self.folder.glob("*.pth"):
            try:
                found[path.name] = load(str(path))
            except ValueError as error:
                self.outcome.fail("a damaged file", f"{when}: {error}")
        for name in sorted(self.kept - found.keys()):
            self.outcome.fail("a file is lost", f"{when}: {name}")
        self.kept = set(found)
        self._check_names(when, found, epochs)

    def _check_log(self, when: str) -> set[int]:
        """Return the epochs in log.txt. Only its last line may be cut off."""
        path = self.folder / "log.txt"
        epochs = set()
        lines: list[str] = []
        if path.exists():
            lines = path.read_text().split("\n")
        for number, line in enumerate(lines):
            try:
                epochs.add(json.loads(line)["epoch"])
            except (ValueError, KeyError):
                if number + 1 < len(lines):
                    self.outcome.fail("a damaged file", f"{when}: log.txt, line {number + 1}: {line[:60]}")
        return epochs

    def _check_names(self, when: str, found: dict[str, Any], epochs: set[int]) -> None:
        """The last checkpoint says which epochs are done: their files and lines must be there."""
        last = found.get("checkpoint-last.pth")
        if last is None:
            if found:
                self.outcome.fail("a file is lost", f"{when}: checkpoint-last.pth, with {sorted(found)}")
            return
        done = int(last.entries["epoch"])
        # The names of the last epoch may be missing after a kill; the next start makes up for it.
        for epoch in range(done):
            if f"checkpoint-{epoch}.pth" not in found:
                self.outcome.fail(
                    "a file is lost", f"{when}: checkpoint-{epoch}.pth of {done} finished epochs"
                )
        if done > 0 and self.reference.kind == "fine-tuning" and "checkpoint-best.pth" not in found:
            self.outcome.fail("a file is lost", f"{when}: checkpoint-best.pth")
        if missing := set(range(done + 1)) - epochs:
            self.outcome.fail("a file is lost", f"{when}: the lines of epochs {sorted(missing)} in log.txt")


def record(folder: Path) -> dict[str, dict[str, Any]]:
    """Return each file's name with what it says, without what depends on the clock and on paths."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or OTHER.search(name):
            continue
        if path.suffix == ".pth":
            saved = torch.load(path, weights_only=True)
            saved["args"] = {k: v for k, v in saved["args"].items() if k not in PATHS}
            found[name] = flat(saved)
        elif path.name == "log.txt":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = flat([{k: v for k, v in line.items() if k not in CLOCK} for line in lines])
        else:
            found[name] = {"bytes": path.read_bytes()}
    return found


def difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    places = sorted(k for k in one.keys() | other.keys() if one.get(k) != other.get(k))
    first = places[0]
    values = [str(record.get(first))[:80] for record in (one, other)]
    return f"{len(places)} values, the first {first}: {values[0]}, found {values[1]}"


def judged(references: dict[str, Reference], root: Path, seed: int, number: int) -> Outcome:
    """Kill runs until there were `KILLS` kills, and let each run end."""
    draw = random.Random(f"kills {seed} {number}")
    kind = sorted(MAINS)[number % len(MAINS)]
    outcome = Outcome(number, kind, "not ended")
    for start_number in range(MOST_RUNS):
        run = Run(references[kind], root / f"run {number}-{start_number}", draw, outcome)
        if not run.links:
            outcome.what += " without hard links"
        # A run may end before its kill.
        while outcome.kills < KILLS and run.kill(aimed=outcome.kills % 2 == 1):
            pass
        run.end()
        if outcome.kills == KILLS or outcome.failures:
            break
    return outcome


def attack(count: int, seed: int, keep: Path | None, only: int | None = None) -> list[Outcome]:
    """Kill `count` times at drawn moments and `count` times at drawn operations."""
    numbers = list(range(-(-2 * count // KILLS)))
    if only is not None:
        numbers = [only]
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        root = Path(folder)
        make_data(root / "data")
        references = {kind: Reference(kind, root) for kind in MAINS}

        def work(batch: list[int], begin: Begin) -> Iterator[Outcome]:
            for number in batch:
                begin(number, "runs")
                yield judged(references, root, seed, number)

        outcomes = judge([[number] for number in numbers], work, LIMITS)
        for outcome in outcomes:
            for run in root.glob(f"run {outcome.number}-*/"):
                if keep is not None and outcome.failures:
                    shutil.copytree(run, keep / run.name, dirs_exist_ok=True)
    return outcomes
