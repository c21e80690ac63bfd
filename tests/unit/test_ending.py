"""Signals after the end of a run: ignored where only the exit follows, handled as before elsewhere."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from util.dist import StopSignal, shutdown
from util.flags import ending

ROOT = Path(__file__).parents[2]
ALL = StopSignal.SIGNALS


def handle(number, frame):
    """What a notebook, a test or submitit has set."""


@pytest.fixture(autouse=True)
def handlers_of_the_caller():
    before = {number: signal.signal(number, handle) for number in ALL}
    yield
    ending._replaced.clear()
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers() -> dict:
    return {number: signal.getsignal(number) for number in ALL}


CALLERS = dict.fromkeys(ALL, handle)
IGNORED = dict.fromkeys(ALL, signal.SIG_IGN) | {signal.SIGINT: handle}


def test_a_library_gives_the_handlers_back():
    with StopSignal() as stop:
        assert handlers() == dict.fromkeys(ALL, stop._handle)
    assert handlers() == CALLERS
    # A run in the launcher's process, where others may follow.
    with ending.exit_follows():
        with ending.exit_follows(False):
            for _ in range(2):
                with StopSignal():
                    pass
                assert handlers() == CALLERS
        assert handlers() == CALLERS
    assert handlers() == IGNORED


def test_an_evaluation_without_a_loop_ends_at_shutdown():
    shutdown()
    assert handlers() == CALLERS, "in a notebook"
    with ending.exit_follows():
        shutdown()
        assert handlers() == IGNORED


def test_signals_are_ignored_from_the_end_of_the_loop_on():
    with ending.exit_follows():
        assert handlers() == CALLERS, "until the loop begins"
        with StopSignal():
            pass
        assert handlers() == IGNORED
    assert handlers() == IGNORED


def test_signals_are_ignored_after_a_main_without_a_loop():
    with ending.exit_follows():
        pass
    assert handlers() == IGNORED


def test_signals_act_again_if_something_follows_after_all():
    for _ in range(2):
        with ending.exit_follows():
            assert handlers() == CALLERS
            for _ in range(2):
                with StopSignal():
                    pass
        assert handlers() == IGNORED
    with StopSignal() as stop:
        assert handlers() == dict.fromkeys(ALL, stop._handle), "a second loop listens"
    assert handlers() == IGNORED


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_after_an_error_a_signal_can_end_a_rank_that_hangs(error):
    with pytest.raises(error), ending.exit_follows(), StopSignal():
        raise error
    assert handlers() == CALLERS
    with StopSignal():
        pass
    assert handlers() == CALLERS, "the declaration has ended with its context"


def test_a_thread_leaves_handlers_alone():
    seen = []

    def in_thread():
        with ending.exit_follows(), StopSignal():
            pass
        seen.append(handlers())

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert seen == [CALLERS]


SCRIPT = """
import argparse, os, sys
from util.flags.parser import run

if sys.argv[1] == "session":
    sys.ps1 = ">>> "

class Gone:
    kill, number, pid = os.kill, int(sys.argv[2]), os.getpid()

    def __del__(self):
        self.kill(self.pid, self.number)

def main(flags):
    if sys.argv[1] == "error":
        raise ValueError("found nothing")
    return 75

gone = Gone()  # deleted when Python has removed its handlers
code = run(main, argparse.Namespace())
print("code", code, flush=True)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGUSR2", "SIGUSR1", "SIGTERM"])
def test_a_script_ends_with_its_code(name):
    number = int(getattr(signal, name))
    expected = {"script": (75, 75), "session": (75, -number), "error": (2, -number)}
    for kind, (code, end) in expected.items():
        command = [sys.executable, "-c", SCRIPT, kind, str(number)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert (done.stdout, done.returncode) == (f"code {code}\n", end), (kind, done.stderr)


@pytest.mark.slow
def test_a_person_can_end_a_process_that_hangs_as_it_exits():
    command = [sys.executable, "-c", SCRIPT, "script", str(int(signal.SIGINT))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGINT, done
