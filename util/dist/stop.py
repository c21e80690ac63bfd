"""Signals that ask a run to stop, agreed on by all ranks."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable

import torch
import torch.distributed as td

from util.dist import group


class StopSignal:
    """SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 ask for a stop; handlers only set a flag.

    `agreed()` is called once per step on every rank and is True on all of them at the same step once any was asked.
    The flag travels by an asynchronous all-reduce between hosts that is read one step later, so that neither the
    device nor the step waits for it. A second SIGINT interrupts at once, for people at a terminal.

    A process that has not left `with` within `patience` seconds of a signal writes to stderr where it is: schedulers end
    a job that hangs without a word. Then, but for SIGINT, it calls `when_stuck(left)`, in a thread; `left` is set when it
    does leave.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self, when_stuck: Callable[[threading.Event], None] | None = None, patience: float = 25):
        self.received: str | None = None
        self.when_stuck, self.patience = when_stuck, patience
        self._group = (
            td.new_group(backend="gloo", timeout=group.timeout()) if group.world_size() > 1 else None
        )
        self._pending: tuple | None = None
        self._previous = {}
        self._left = threading.Event()

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self  # the caller handles signals
        self._previous = {s: signal.signal(s, self._handle) for s in self.SIGNALS}
        # Python runs handlers in the main thread, and not while that waits in a collective. This pipe hears at once.
        heard, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        self._previous_wakeup = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, args=(heard,), daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *exc):
        if not self._previous:
            return
        for s, handler in self._previous.items():
            signal.signal(s, handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        self._left.set()
        os.write(self._wakeup, b"\0")  # closing it would not do: data workers have inherited it
        os.close(self._wakeup)
        self._watcher.join(
            5
        )  # its last breath may free the process group, which must not be while Python ends

    def _watch(self, heard: int) -> None:
        main = threading.main_thread().ident
        while (numbers := os.read(heard, 64)) and 0 not in numbers:
            asked = [s for s in self.SIGNALS if s in numbers]
            if asked and not self._left.wait(self.patience):
                print(
                    f"rank {group.rank()} has not stopped within {self.patience:g} s of {asked[0].name}. It is in\n"
                    + "".join(traceback.format_stack(sys._current_frames()[main])),
                    file=sys.stderr,
                    flush=True,
                )
                if self.when_stuck is not None and asked != [
                    signal.SIGINT
                ]:  # that is a person, who wants it to end
                    self.when_stuck(self._left)
        os.close(heard)

    def _handle(self, number, frame):
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def agreed(self, now: bool = False) -> bool:
        """Whether any rank was asked to stop before its previous call; with `now`, before this one, waiting for all."""
        if self._group is None:
            return self.received is not None
        asked = self._read()
        flag = torch.tensor([int(self.received is not None)])
        self._pending = (flag, td.all_reduce(flag, op=td.ReduceOp.MAX, group=self._group, async_op=True))
        return self._read() or asked if now else asked

    def _read(self) -> bool:
        if self._pending is None:
            return False
        (flag, work), self._pending = self._pending, None
        work.wait()
        return bool(flag.item())
