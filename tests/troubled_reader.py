"""The mains of tests/tiny.py whose data workers meet trouble at one image.

TEST_READ="SIGKILL:NAME" kills the worker that has read the image NAME. "hang:NAME" lets it wait for ever, and
"SIGTERM:NAME" as well, and the run then gets that signal while it waits. TEST_PATIENCE is the number of
seconds that a run which is asked to stop waits for a batch.
"""

import importlib
import os
import signal
import sys
import time

import torch
from torch.utils.data import get_worker_info

import tiny  # puts the small models into the registries
from util.data.loading import waits
from util.data.sources.image_index import ImageIndex
from util.flags.parser import parse, run


def trouble(kind: str, name: str) -> None:
    """Replace the method that reads an image, in the workers only."""
    plain = ImageIndex.read

    def read(index, i):
        data = plain(index, i)
        if get_worker_info() is None or index.name(i) != name:
            return data
        while kind in ("hang", "SIGTERM"):
            time.sleep(1)
        os.kill(os.getpid(), getattr(signal, kind))

    ImageIndex.read = read


def stop_at(name: str) -> None:
    """Send SIGTERM to this process, once, while it waits for a worker that reads the image NAME."""
    plain, sent = waits.Crew._look, []

    def look(crew):
        if name in crew._reading() and not sent:
            sent.append(name)
            os.kill(os.getpid(), signal.SIGTERM)
        plain(crew)

    waits.Crew._look = look


if __name__ == "__main__":
    # Workers that are not forked would not have the other method.
    torch.multiprocessing.set_start_method("fork")
    torch.set_num_threads(1)
    waits.PATIENCE = float(os.environ.get("TEST_PATIENCE", waits.PATIENCE))
    if "TEST_READ" in os.environ:
        kind, name = os.environ["TEST_READ"].split(":")
        trouble(kind, name)
        if kind == "SIGTERM":
            stop_at(name)
    main = importlib.import_module(sys.argv[1])
    tiny.disturb(main, None, None)
    sys.exit(run(main.main, parse(main.get_args_parser(), sys.argv[2:])))
