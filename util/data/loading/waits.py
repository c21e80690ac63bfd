"""Waiting for data workers: one that does not answer, one that was killed, and a run that is asked to stop.

A wait happens in the main thread. A timer interrupts it every second, so that nothing is lost where batches
come faster than that, and torch's own queues and their order stay as they are.
"""

import contextlib
import multiprocessing.connection
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from util import dist
from util.data.sources import image_index
from util.dist.allocator import return_freed_memory
from util.files.names import printable

T = TypeVar("T")

TICK = 1.0  # seconds between two looks at a wait
PATIENCE = 10.0  # seconds that a run which is asked to stop still waits for its batch
# Why a signal ends a data worker, and what helps.
MEMORY = "lower `num_workers` or `batch_size`, or ask for more memory"
CAUSES = {
    "SIGKILL": f"usually because no memory is left: {MEMORY}",
    "SIGBUS": "usually because /dev/shm is full: lower `num_workers` or `batch_size`, or enlarge it",
}
# Windows has neither the timer nor masks of signals. A hanging file system is not noticed there.
HAS_TIMER = hasattr(signal, "setitimer")
CRASH = "so that file is damaged, or a library that reads it: remove the file, and report the crash"


class NoData(ValueError):
    """The batch that a loader waits for does not come."""


class WorkerKilled(NoData):
    """A data worker has ended; `number` is the signal, or 0."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


class StopAsked(BaseException):
    """A run that is asked to stop waits for data in vain. It is no error, so no handler of errors gets it."""


@dataclass
class Guard:
    """What a run does when its data do not come.

    Attributes:
        stop: the run's signals.
        sharded: whether the state is spread over the ranks.
        failure: why the run is to stop, if this rank has lost a worker.
    """

    stop: dist.StopSignal
    sharded: bool
    failure: str = ""

    def may_leave(self) -> bool:
        """Whether a stop is asked for, and this process can save and leave without the others.

        Other ranks may be inside of the update that this one waits for, and take part in nothing else before
        it ends. Rank 0 has the whole state after the finished updates and needs nobody. Any other rank, and
        every rank of a sharded model, has to wait.
        """
        return self.stop.received is not None and dist.is_main() and not self.sharded

    def survives(self, error: WorkerKilled) -> bool:
        """Whether this process loads its images itself until all ranks have stopped, which this asks for.

        A single process saves at once instead. An image that has crashed a worker would crash this process as
        well.
        """
        if dist.world_size() == 1 or error.number != getattr(signal, "SIGKILL", None):
            return False
        self.failure = str(error)
        self.stop.received = self.stop.received or "the loss of a data worker"
        print(f"warning: {error}; this rank loads its own images until all have stopped", flush=True)
        return True


_guard: Guard | None = None


@contextlib.contextmanager
def guarded(guard: Guard) -> Iterator[None]:
    """Let `guard` decide within the block. Without one, every wait ends with an error."""
    global _guard
    _guard = guard
    try:
        yield
    finally:
        _guard = None


def survives(error: WorkerKilled) -> bool:
    """Whether the run's guard lets this process load its images itself."""
    return _guard is not None and _guard.survives(error)


# --- in a worker ---

# (process, number of the image that it reads + 1, or 0), shared with the parent
_row: np.ndarray | None = None


class StartWorker:
    """The `worker_init_fn` of a loader: lets a worker report in its row of `rows` what it reads."""

    def __init__(self, rows: torch.Tensor):
        self.rows = rows  # int64 (workers, 2), in shared memory

    def __call__(self, worker: int) -> None:
        global _row
        return_freed_memory()
        _row = self.rows[worker].numpy()
        _row[:] = os.getpid(), 0
        image_index.report_reads(_report)


def _report(image: int) -> None:
    assert _row is not None
    _row[1] = image + 1


def batch_is_read() -> None:
    """Report that this worker reads nothing; do nothing elsewhere."""
    if _row is not None:
        _row[1] = 0


# --- in the parent ---


class Crew:
    """The workers of one loader, as seen by the process that waits for them.

    Args:
        dataset: what they load; its `index`, if it has one, names the images.
        workers: their number.
        minutes: how long a batch may take; 0 means for ever.
    """

    def __init__(self, dataset: Any, workers: int, minutes: float):
        self.dataset = dataset
        self.minutes = minutes
        self.rows = torch.zeros(workers, 2, dtype=torch.int64)
        if workers:
            self.rows.share_memory_()
        self.processes: list[Any] = []
        self.dismissed = False
        self._waited = 0.0
        self._asked = 0.0

    def start(self, start: Callable[[], T]) -> T:
        """Return `start()`, which starts the workers, or wakes them for another epoch.

        Raises the errors of `wait`.
        """
        if self.processes:
            return self.wait(start)
        others = set(multiprocessing.active_children())
        if not HAS_TIMER:
            try:
                return start()
            finally:
                self.processes = [p for p in multiprocessing.active_children() if p not in others]
        # Schedulers and terminals signal every process. The parent decides what follows, and needs its
        # workers until it has saved. They start with these signals blocked, so that none can ever end one.
        blocked = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            return start()
        finally:
            # torch's handler would raise the death of a worker anywhere, also in the middle of an optimizer's
            # step, after which there is no whole state to save.
            if _in_main_thread() and handler is not None:
                signal.signal(signal.SIGCHLD, handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            self.processes = [p for p in multiprocessing.active_children() if p not in others]

    def wait(self, call: Callable[[], T]) -> T:
        """Return `call()`, which waits for the workers.

        Raises WorkerKilled if one of them has ended, NoData if they do not answer in time, and StopAsked if
        the run is to stop meanwhile and can. The workers are killed after these and after errors of their
        own. Outside of the main thread only ended workers are noticed.
        """
        self._waited = 0.0
        self._asked = 0.0
        try:
            # Twice, as a tick may raise between the end of the call and the first line that disarms.
            try:
                _arm(self._look)
                return call()
            finally:
                _disarm()
        except StopIteration:
            raise
        except (Exception, StopAsked) as error:
            _disarm()
            error = self._explained(error)
            self.dismiss()
            raise error

    def _explained(self, error: Exception | StopAsked) -> Exception | StopAsked:
        """Return WorkerKilled or NoData for an error that shows a worker's end; any other one as it is."""
        if isinstance(error, (NoData, StopAsked)):
            return error
        if isinstance(error, MemoryError):
            return NoData(self._here(f"a data worker has no memory left: {MEMORY}"))
        # An error that a worker has raised, and sent, has its traceback in the message.
        if "Original Traceback" not in str(error):
            self._settle()
        dead = self._dead()
        if dead:
            return self._killed(dead)
        return error

    def dismiss(self) -> None:
        """Kill all workers. They ignore gentler signals, and may hang; torch would wait 10 s for each."""
        self.dismissed = True
        for process in self.processes:
            process.kill()

    def _look(self) -> None:
        """Look at the workers, at each tick of a wait."""
        dead = self._dead()
        if dead:
            raise self._killed(dead)
        # Ticks and not the clock, as a scheduler may suspend a job for hours.
        self._waited += TICK
        if self.minutes and self._waited >= 60 * self.minutes:
            raise NoData(self._here(self._silent()))
        if _guard is not None and _guard.may_leave():
            self._asked += TICK
            if self._asked >= PATIENCE:
                raise StopAsked

    def _dead(self) -> list[Any]:
        # Workers persist: as long as somebody waits for them, none of them ends by itself.
        return [process for process in self.processes if process.exitcode is not None]

    def _settle(self) -> None:
        """Wait for the end of a process that ends: its connections close a moment before."""
        ending = multiprocessing.connection.wait([process.sentinel for process in self.processes], timeout=5)
        for process in self.processes:
            if process.sentinel in ending:
                process.join(5)

    def _killed(self, dead: list[Any]) -> WorkerKilled:
        images = self._reading([process.pid for process in dead])
        code = dead[0].exitcode
        while_reading = ""
        if images:
            while_reading = f" while it read {images}"
        if code >= 0:
            text = f"a data worker has ended with exit code {code}{while_reading}"
            return WorkerKilled(self._here(text), 0)
        number = signal.Signals(-code)
        text = f"a data worker was killed by {number.name}{while_reading}, {CAUSES.get(number.name, CRASH)}"
        return WorkerKilled(self._here(text), number)

    def _silent(self) -> str:
        images = self._reading()
        doing = "none of them is reading an image"
        if images:
            doing = f"they are reading {images}"
        return (
            f"the data workers have not answered for {self.minutes:g} minutes, and {doing}. Repair the file "
            "system or the file, or raise `data_timeout`"
        )

    def _reading(self, processes: list[int] | None = None) -> str:
        """Name the images that the workers are reading, or those with the given process numbers."""
        index = getattr(self.dataset, "index", None)
        images = [
            image - 1
            for process, image in self.rows.tolist()
            if image and (processes is None or process in processes)
        ]
        if not images or index is None:
            return ""
        names = image_index.some_names([printable(index.name(image)) for image in images])
        return f"{names} in {printable(index.path)}"

    def _here(self, text: str) -> str:
        """Add to a message where it comes from, if there are several ranks."""
        if dist.world_size() == 1:
            return text
        return f"rank {dist.rank()} on {socket.gethostname()}: {text}"


# --- the timer ---

_look: Callable[[], None] | None = None


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _arm(look: Callable[[], None]) -> None:
    """Call `look` in the main thread every TICK seconds; do nothing in another thread."""
    global _look
    if not (HAS_TIMER and _in_main_thread()):
        return
    # It stays installed: a signal that comes late must not meet the default action, which ends the process.
    if signal.getsignal(signal.SIGALRM) is not _tick:
        signal.signal(signal.SIGALRM, _tick)
    _look = look
    signal.setitimer(signal.ITIMER_REAL, TICK, TICK)


def _disarm() -> None:
    global _look
    if not (HAS_TIMER and _in_main_thread()):
        return
    _look = None
    signal.setitimer(signal.ITIMER_REAL, 0)


def _tick(*_: Any) -> None:
    if _look is not None:
        _look()
