"""Signals that ask a run to stop, agreed on by all ranks."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as td

from util.dist import group
from util.flags import ending


class StopSignal:
    """A context in which SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 ask the run to stop.

    The handlers only set a flag. `agreed()` is called once per step on every rank, and becomes True on all of
    them at the same step once any rank has received a signal. The flag travels in an asynchronous all-reduce
    between hosts that is read one step later, so that neither the device nor the step waits for it. A second
    SIGINT interrupts at once, for people at a terminal.

    If the process has not left the context within `patience` seconds of a signal, its stack is printed to
    stderr: schedulers kill a job that hangs without a message. Then, unless the signal was SIGINT,
    `when_stuck(left)` is called in a thread; the event `left` is set when the process does leave.

    At the end the handlers of before come back. In a script or a submitted job (see `ending.exit_follows`)
    only the exit follows, within seconds. Signals other than SIGINT are then ignored for good. After an error
    the handlers of before come back in any case.
    """

    SIGNALS = ending.known_signals("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")

    def __init__(self, when_stuck: Callable[[threading.Event], None] | None = None, patience: float = 25):
        self.received: str | None = None
        self.when_stuck = when_stuck
        self.patience = patience
        self._group: Any = None
        if group.world_size() > 1:
            self._group = td.new_group(backend="gloo", timeout=group.timeout())
        self._pending: tuple[torch.Tensor, td.Work] | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._left = threading.Event()
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is not threading.main_thread():
            # Only the main thread can set handlers. The caller handles signals.
            return self
        self._previous = {s: signal.signal(s, self._handle) for s in self.SIGNALS}
        # On Windows, Python 3.11 cannot make such a pipe. There, a process that hangs is not reported.
        if hasattr(os, "set_blocking"):
            self._start_watching()
        return self

    def _start_watching(self) -> None:
        # Python runs handlers in the main thread, and not while that waits in a collective. The number of a
        # signal is written to this pipe at once.
        read_end, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        self._previous_wakeup = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, args=(read_end,), daemon=True)
        self._watcher.start()

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if not self._previous:
            return
        # Without a moment in which the handlers of before could end the process.
        ignored: tuple[signal.Signals, ...] = ()
        if kind is None and ending.done(self._previous):
            ignored = ending.IGNORED
        for s, handler in self._previous.items():
            if s not in ignored:
                signal.signal(s, handler)
        if self._watcher is not None:
            signal.set_wakeup_fd(self._previous_wakeup)
        self._left.set()
        if self._watcher is None:
            return
        # Closing the pipe would not end the watcher: data workers have inherited it.
        os.write(self._wakeup, b"\0")
        os.close(self._wakeup)
        # The watcher may hold the last reference to the process group, which must not be freed while Python
        # shuts down.
        self._watcher.join(5)

    def _watch(self, read_end: int) -> None:
        """Report a process that does not leave after a signal. Runs in a thread until a zero byte arrives."""
        while True:
            numbers = os.read(read_end, 64)
            if not numbers or 0 in numbers:
                break
            asked = [s for s in self.SIGNALS if s in numbers]
            if asked and not self._left.wait(self.patience):
                self._report_stuck(asked)
        os.close(read_end)

    def _report_stuck(self, asked: list[signal.Signals]) -> None:
        main = threading.main_thread().ident
        assert main is not None
        stack = "".join(traceback.format_stack(sys._current_frames()[main]))
        print(
            f"rank {group.rank()} has not stopped within {self.patience:g} s of {asked[0].name}. "
            f"It is in\n{stack}",
            file=sys.stderr,
            flush=True,
        )
        # SIGINT alone comes from a person, who wants the run to end.
        if self.when_stuck is not None and asked != [signal.SIGINT]:
            self.when_stuck(self._left)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def agreed(self, now: bool = False) -> bool:
        """Whether any rank had received a signal before its previous call; with `now`, before this one.

        With `now` it waits for all ranks.
        """
        if self._group is None:
            return self.received is not None
        asked = self._read()
        flag = torch.tensor([int(self.received is not None)])
        work = td.all_reduce(flag, op=td.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (flag, work)
        if now:
            return self._read() or asked
        return asked

    def _read(self) -> bool:
        """The result of the all-reduce that the previous call started."""
        if self._pending is None:
            return False
        flag, work = self._pending
        self._pending = None
        work.wait()
        return bool(flag.item())
