"""The end of a process: a signal must not turn a run that is done into a failed one.

A scheduler may warn a run in its last second. Python removes its signal handlers while it shuts down, and the
default action would then kill the process. The scheduler would count a finished job as failed, and cancel the
jobs that wait for it. Only a signal that is ignored stays so until the process is gone.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any


def known_signals(*names: str) -> tuple[signal.Signals, ...]:
    """The signals of these names that the system has; Windows has fewer of them."""
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


# What schedulers send. SIGINT is left out: it comes from a person, who may end a process that hangs as it
# exits. The state is saved by then.
IGNORED = known_signals("SIGTERM", "SIGUSR1", "SIGUSR2")

_exit_follows = False
# The handlers of before `done`.
_replaced: dict[signal.Signals, Any] = {}


def _may_set_handlers() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def exit_follows(really: bool = True) -> Iterator[None]:
    """Declare whether this process does nothing more after the code inside but exit.

    It does so in a script and in a submitted job, and not in a notebook. If the code then ends without an
    error, signals are ignored from there on. A training loop inside ignores them from its own end on (see
    `done`). After an error the handlers stay as they are: a rank whose peers are gone may hang, and must not
    need a SIGKILL.
    """
    global _exit_follows
    before = _exit_follows
    # Something followed after all if the process comes here again.
    while _replaced and _may_set_handlers():
        signal.signal(*_replaced.popitem())
    _exit_follows = really
    try:
        yield
        done()
    finally:
        _exit_follows = before


def done(handlers: Mapping[signal.Signals, Any] | None = None) -> bool:
    """Ignore signals for good if only the exit of the process follows; return whether this is so.

    `handlers` are what the caller would set otherwise.
    """
    if not _exit_follows or not _may_set_handlers():
        return False
    for number in IGNORED:
        current = signal.signal(number, signal.SIG_IGN)
        _replaced.setdefault(number, (handlers or {}).get(number, current))
    return True
