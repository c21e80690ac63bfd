"""A run of the engine that takes milliseconds, a linear classifier of stored numbers, and its folder."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import engine
from engine import Objective, Session, Setup, fit
from util.data.datasets import TensorSamples
from util.data.loading.loader import train_loader
from util.data.pixels import Pixels
from util.run import plan
from util.run.checkpoint_manager import CheckpointManager
from util.run.log import Log
from util.run.session import open_budget
from util.train.optim import adamw
from util.weights.checkpoint import load_start

# Four updates an epoch.
IMAGES = 32
BATCH = 8
SETUP = Setup(torch.device("cpu"), "fp32", (1, 1), Pixels((0.0,), (1.0,)))
FLAGS = dict(epochs=2, save_every_epochs=1, save_minutes=0, save_steps=0, keep=0)
BUDGET = dict(
    min_lr=0.0, warmup_epochs=1, seed=0, accum_iter=1, clip_grad=None, max_bad_images=1.0, max_steps=None
)
CLOCK = ("img_per_s", "data_wait", "mfu")


def nothing(number: int) -> None:
    pass


@dataclass
class Classify(Objective):
    """Cross-entropy. `accuracies` are those of the epochs' ends; the hooks get the number of the update of
    this process, from 1, and of the epoch."""

    accuracies: tuple[float, ...] = ()
    in_update: Callable[[int], None] = nothing
    in_evaluation: Callable[[int], None] = nothing
    updates: int = 0

    def loss(self, model, batch):
        self.updates += 1
        self.in_update(self.updates)
        loss = F.cross_entropy(model(batch["image"]), batch["label"])
        return loss, {"class": loss}

    def after_epoch(self, epoch, state):
        self.in_evaluation(epoch)
        if not self.accuracies:
            return {}
        accuracy = self.accuracies[epoch]
        if state.best is None or accuracy > state.best:
            state.best = accuracy
            state.best_epoch = epoch
        return {"test_acc1": accuracy}


def samples(name: Callable[[int], str] = str) -> TensorSamples:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(IMAGES, 4, 1, 1, generator=generator) * 255
    index = Index(classes=["a", "b"], path="x", digest=lambda: "", name=name)
    return TensorSamples(x, torch.arange(IMAGES) % 2, index)


class Index(SimpleNamespace):
    """A listing of no images in particular."""

    def __len__(self) -> int:
        return 16


def small_run(folder, objective=None, data=None, log_dir=None, print_freq=2, **flags) -> bool:
    """Train in `folder`, from its last checkpoint on; see `engine.fit`."""
    args = SimpleNamespace(**BUDGET | FLAGS | flags, compile=False, compile_mode="default")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    optimizer = adamw([dict(params=list(model.parameters()), weight_decay=0.0)], 0.01, betas=(0.9, 0.99))
    loader = train_loader(data or samples(), batch_size=BATCH, seed=0, num_workers=0, pin_memory=False)
    manager = CheckpointManager(
        str(folder), args.save_every_epochs, args.save_minutes, args.save_steps, args.keep
    )
    log = Log(str(folder), log_dir, print_freq)
    session = Session(log, FLAGS | flags, manager, load_start(str(folder), ""))
    with pytest.MonkeyPatch.context() as quick:
        # Measuring the machine and asking git take longer than the run.
        quick.setattr(engine, "peak_flops", lambda *args: 1e9)
        quick.setattr(plan, "commit", lambda: None)
        quick.setattr(plan, "versions", dict)
        return fit(model, objective or Classify(), optimizer, loader, SETUP, open_budget(args, 0.01), session)


def contents(folder) -> dict[str, object]:
    """What a run leaves: names, the bits of checkpoints, and log.txt, without what depends on the clock."""
    found: dict[str, object] = {}
    for path in sorted(Path(folder).iterdir()):
        found[path.name] = None
        if path.suffix == ".pth":
            found[path.name] = plain(torch.load(path, weights_only=True))
    found["log.txt"] = [
        {k: v for k, v in line.items() if k not in CLOCK} | {k: None for k in CLOCK if k in line}
        for line in lines(folder)
    ]
    return found


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "log.txt").read_text().splitlines()]


def plain(value):
    """Tensors as lists, which can be compared."""
    if torch.is_tensor(value):
        return value.tolist()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if not str(k).startswith("cost_")}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value
