"""Hostile input is judged in forked children, so that a crash, a hang or a flood of memory is an outcome.

A child judges a batch of numbered inputs and announces each one before it touches it. If the child dies, the
announced input is to blame, and another child goes on with the next one.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path

MB = 2**20
# Python functions that start a program or reach for the network.
FORBIDDEN = {
    "subprocess.Popen",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "pty.spawn",
    "socket.connect",
    "socket.getaddrinfo",
}
TIMERS = {signal.SIGALRM: signal.ITIMER_REAL, signal.SIGPROF: signal.ITIMER_PROF}
CHARACTERS = 400  # of an error that are kept


@dataclass(frozen=True)
class Limits:
    """What one input may cost: seconds of CPU and on the clock, and MB above what the child had before.

    A child that asks for `address_mb` more gets no memory: the machine must survive the attack.
    """

    cpu: float
    wall: float
    memory_mb: float
    address_mb: int = 6000


@dataclass
class Outcome:
    """What became of input `number`; `what` describes it. A failure is a kind and a detail.

    `seconds` are of the processor: a busy machine does not make an input slow.
    """

    number: int
    what: str = ""
    verdict: str = "refused"
    failures: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    peak_mb: float = 0.0
    kills: int = 0

    def add(self, later: "Outcome") -> None:
        """Take over the failures and the cost of a later look at the same input."""
        self.failures += later.failures
        self.seconds += later.seconds
        self.peak_mb = max(self.peak_mb, later.peak_mb)

    def fail(self, kind: str, detail: object = "") -> None:
        self.failures.append((kind, str(detail)[:CHARACTERS]))


Begin = Callable[[int, str], None]
# (numbers, begin) -> their outcomes. Runs in the child, and calls begin(number, what) before each.
Work = Callable[[list[int], Begin], Iterator[Outcome]]


class Started(BaseException):
    """Input has started a program or opened a connection. No `except Exception` may hide that."""


_watching = False


def _forbid(event: str, arguments: tuple) -> None:
    if _watching and event in FORBIDDEN:
        raise Started(f"{event} {arguments}")


sys.addaudithook(_forbid)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Raise `Started` at whatever starts a program or opens a connection in the block."""
    global _watching
    _watching = True
    try:
        yield
    finally:
        _watching = False


@contextlib.contextmanager
def measured(outcome: Outcome, limits: Limits) -> Iterator[None]:
    """Note time and memory of the block in the outcome. What takes too long kills the process."""
    before = _status("VmRSS") - _status("RssFile")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    begin = time.process_time()
    signal.setitimer(signal.ITIMER_REAL, limits.wall)
    signal.setitimer(signal.ITIMER_PROF, limits.cpu)
    try:
        yield
    finally:
        for timer in TIMERS.values():
            signal.setitimer(timer, 0)
        outcome.seconds += time.process_time() - begin
        # Without the pages of files: a forked child has them from its first use of a library on.
        peak = _status("VmHWM") - _status("RssFile") - before
        outcome.peak_mb = max(outcome.peak_mb, peak)
        if peak > limits.memory_mb:
            outcome.fail("memory", f"{peak:.0f} MB")


def _status(name: str) -> float:
    """Return a figure of this process from the kernel, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"the kernel does not tell {name}")


class Child:
    """A forked process that judges a batch."""

    def __init__(self, numbers: list[int], work: Work, limits: Limits):
        self.numbers = numbers
        self.done: dict[int, Outcome] = {}
        self.current: Outcome | None = None
        self.log = tempfile.NamedTemporaryFile(prefix="attack-")  # noqa: SIM115 (open until `end`)
        self.connection, theirs = multiprocessing.Pipe(duplex=False)
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            # Nothing may return into the parent's code.
            try:
                self._judge(work, theirs, limits)
            finally:
                os._exit(70)
        theirs.close()

    def _judge(self, work: Work, results: Connection, limits: Limits) -> None:
        for descriptor in (1, 2):
            os.dup2(self.log.fileno(), descriptor)
        faulthandler.enable(sys.stderr)
        for number in TIMERS:
            signal.signal(number, signal.SIG_DFL)
            # The stack of a hang, and then the default: the end of the process.
            faulthandler.register(number, sys.stderr, chain=True)
        most = int(_status("VmSize") + limits.address_mb) * MB
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            for outcome in work(self.numbers, lambda number, what: results.send((number, what))):
                results.send(outcome)
            results.send(None)
        except BaseException:
            results.send(traceback.format_exc())
        os._exit(0)

    def note(self, message: object) -> None:
        """Take a message of the child."""
        if isinstance(message, Outcome):
            # A second outcome of an input adds to the first.
            first = self.done.setdefault(message.number, message)
            if first is not message:
                first.add(message)
            self.current = None
        elif isinstance(message, tuple):
            self.current = Outcome(*message)
        elif isinstance(message, str):
            self._blame("harness", message[-CHARACTERS:])

    def end(self) -> list[int]:
        """Wait for the process, blame an input if it was killed, and return the numbers that are left."""
        _, status = os.waitpid(self.pid, 0)
        self.connection.close()
        if os.WIFSIGNALED(status):
            number = signal.Signals(os.WTERMSIG(status))
            kind = number.name
            if number in TIMERS:
                kind = "hang"
            self._blame(kind, self._place())
        elif self.numbers and not self.done:
            # A child that ends before its first input would be started for ever.
            self._blame("harness", self._place())
        self.log.close()
        return [number for number in self.numbers if number not in self.done]

    def _blame(self, kind: str, detail: str) -> None:
        left = [number for number in self.numbers if number not in self.done]
        outcome = self.current or Outcome((left or self.numbers)[0])
        outcome.fail(kind, detail)
        self.note(outcome)

    def _place(self) -> str:
        """Return the innermost functions of the stack that faulthandler has printed."""
        lines = Path(self.log.name).read_text(errors="replace").splitlines()
        frames = [line.strip().rpartition("/")[2] for line in lines if line.strip().startswith("File ")]
        return " < ".join(frames[:4]) or "\n".join(lines[-3:])


def judge(batches: list[list[int]], work: Work, limits: Limits, workers: int = 2) -> list[Outcome]:
    """Return the outcomes of all numbers, in their order. `workers` batches are judged at a time."""
    waiting = deque(batch for batch in batches if batch)
    running: dict[Connection, Child] = {}
    outcomes: list[Outcome] = []
    while waiting or running:
        while waiting and len(running) < workers:
            child = Child(waiting.popleft(), work, limits)
            running[child.connection] = child
        for ready in connection.wait(list(running)):
            child = running[ready]
            try:
                child.note(ready.recv())
            except EOFError:
                del running[ready]
                waiting.extendleft([left] if (left := child.end()) else [])
                outcomes += child.done.values()
    return sorted(outcomes, key=lambda outcome: outcome.number)
