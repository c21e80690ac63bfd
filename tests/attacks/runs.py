"""Very small real trainings, each in a forked child, in which torch is imported already."""

import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

import engine
import main_finetune
import main_pretrain
import tiny  # registers mae_test and vit_test
from util.flags.parser import parse, run

# What mains import when they need it. A child that has it already starts faster.
for slow in (
    "torch.utils.tensorboard",
    "timm",
    "safetensors.torch",
    "tools.convert",
    "torch.utils.flop_counter",
):
    importlib.import_module(slow)

# The device's rate, of which the log reports a share, takes a tenth of a second to measure.
engine.peak_flops = lambda *arguments: None

UPDATES = 2  # of an epoch
COMMON = "--input_size 32 --batch_size 4 --warmup_epochs 1 --lr 1e-2 --num_workers 0 --device cpu --amp fp32 "
COMMON += "--print_freq 1 --save_every_epochs 1 --max_bad_images 1"
MAINS: dict[str, tuple[ModuleType, str]] = {
    "pretraining": (main_pretrain, "--model mae_test --picture_epochs 2"),
    "fine-tuning": (main_finetune, "--model vit_test --ema 0.5"),
}


def make_data(folder: Path) -> None:
    """Write eight pictures of two classes for training, and as many for validation."""
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in "ab":
            (folder / split / name).mkdir(parents=True)
            for number in range(4):
                picture = draw.integers(0, 255, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(picture).save(folder / split / name / f"{number}.png")


def command(kind: str, data: Path, *more: object) -> tuple[ModuleType, list[str]]:
    """Return a main and its command line."""
    main, own = MAINS[kind]
    return main, [*COMMON.split(), *own.split(), "--data_path", str(data), *map(str, more)]


def train(kind: str, data: Path, *more: object) -> int:
    """Run a main in this process; return its exit code."""
    main, words = command(kind, data, *more)
    return run(main.main, parse(main.get_args_parser(), words))


def start(log: Path, call: Callable[[], int]) -> int:
    """Start `call` in a forked child that appends what it prints to `log`; return its process number."""
    # A fork copies no other thread, but their locks.
    assert threading.active_count() == 1, threading.enumerate()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        code = call()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int) -> int:
    """Return the exit code of a child; negative: the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def finished(log: Path, call: Callable[[], int], expected: int = 0) -> None:
    """Run `call` in a child. Raises RuntimeError with what it printed if it ends in another way."""
    code = wait(start(log, call))
    if code != expected:
        raise RuntimeError(f"exit code {code}, not {expected}:\n{log.read_text()[-3000:]}")


def stopped(kind: str, data: Path, output: Path, updates: int) -> None:
    """Train until SIGTERM arrives in that update, so that the state of an unfinished epoch is saved."""

    def call() -> int:
        tiny.disturb(MAINS[kind][0], None, f"0:{updates - 1}:SIGTERM")
        return train(kind, data, "--epochs", 3, "--output_dir", output)

    finished(output.with_suffix(".log"), call, 75)
