"""Dense predictions: grading maps of logits, and training and grading linear maps of frozen features.

Shapes: B images, K classes, G maps of logits that are graded side by side, (h, w) cells, (H, W) pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from util import dist
from util.data.contract import Batches
from util.data.loading.loader import collate, device_batches
from util.data.pixels import Pixels
from util.data.segments.dataset import SegmentDataset
from util.evaluate.segments.counting import ImageCounts
from util.evaluate.segments.figures import Confusion, Figures, Protocol, predict, to_labels
from util.evaluate.segments.loss import losses_of_heads
from util.evaluate.segments.sources import Probes, Sources
from util.files.names import counted, printable
from util.run.log import Log
from util.train.objective import Objective
from util.train.setup import Setup
from util.train.state import TrainState

MOST_CLASSES = 25  # whose IoU is printed

# A batch of one image -> logits (1, G * K, h, w).
Predictor = Callable[[dict], Tensor]
# Sees (number of the image, G predictions (H, W), mask (H, W)).
Record = Callable[[int, Sequence[Tensor], Tensor], None]


@dataclass(frozen=True)
class Evaluation:
    """How images become logits, and logits become predictions at the size of the masks.

    Attributes:
        patch: height and width of a cell in pixels of the model's image.
        counts_file: the file that gets the counts of each image, see `ImageCounts`; "" for none.
    """

    protocol: Protocol
    patch: tuple[int, int]
    counts_file: str = ""

    def logits(self, logits_of: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Return what `logits_of` makes of whole images or of their windows, (B, G * K, h, w)."""
        return predict(logits_of, images, self.protocol.window, self.protocol.stride, self.patch)

    def labels(self, logits: Tensor, size: tuple[int, int]) -> list[Tensor]:
        """Return the G predictions (H, W) of an image from its logits (1, G * K, h, w)."""
        maps = logits.float().split(self.protocol.classes, dim=1)
        protocol = self.protocol
        return [to_labels(each, size, protocol.max_res, protocol.upsample) for each in maps]


@torch.no_grad()
def grade(
    predictor: Predictor,
    names: Sequence[str],
    loader: Batches[SegmentDataset],
    evaluation: Evaluation,
    setup: Setup,
    record: Record | None = None,
) -> dict[str, Figures]:
    """Return the figures of each of the G maps by its name, exact on any number of ranks.

    The loader has batches of one image, or of its features. Raises ValueError if no image can be read.
    """
    confusion = Confusion(evaluation.protocol.classes, setup.device, heads=len(names))
    counts = ImageCounts(evaluation.protocol.classes)
    unreadable: list[int] = []
    images = 0
    for batch in device_batches(loader, setup.device, setup.pixels):
        if batch["bad"]:
            unreadable.append(int(batch["index"][0]))
            continue
        images += 1
        mask = batch["mask"][0]
        with setup.autocast():
            logits = predictor(batch)
        predictions = evaluation.labels(logits, (mask.shape[0], mask.shape[1]))
        for head, prediction in enumerate(predictions):
            confusion.add(prediction, mask, head)
        number = int(batch["index"][0])
        if evaluation.counts_file:
            counts.add(number, predictions, mask)
        if record is not None:
            record(number, predictions, mask)
    images = check_left_out(loader.dataset, images, unreadable)
    confusion.reduce()
    if evaluation.counts_file:
        counts.write(evaluation.counts_file, loader.dataset.name, names, loader.dataset.classes)
    found = {name: confusion.figures(head) for head, name in enumerate(names)}
    return {name: replace(figures, images=images) for name, figures in found.items()}


def check_left_out(dataset: SegmentDataset, images: int, unreadable: Sequence[int]) -> int:
    """Print how many of the images of all ranks are left out, and why the first is; return how many count.

    Takes the number of this rank's images that count, and the numbers of those that cannot be read. Raises
    ValueError if no image counts.
    """
    reason = ""
    if unreadable:
        number = unreadable[0]
        reason = f"{printable(dataset.name(number))}: {printable(dataset.fault(number))}"
    found = dist.gather_objects((images, len(unreadable), reason))
    images, count = (sum(each) for each in list(zip(*found))[:2])
    reason = next((text for _, _, text in found if text), "")
    if not images:
        raise ValueError(
            f"none of the {counted(len(dataset), 'image')} to evaluate on can be read; the first one, "
            f"{reason}"
        )
    if count:
        dist.print_rank0(
            f"warning: the evaluation leaves out {counted(count, 'image')} that cannot be read; "
            f"the first one, {reason}"
        )
    return images


class Predicted(NamedTuple):
    """A sample to show: its image as uint8 (1, C, h, w), its mask and its prediction, both int (H, W)."""

    image: Tensor
    mask: Tensor
    prediction: Tensor


@torch.no_grad()
def predict_samples(
    logits_of: Callable[[Tensor], Tensor],
    samples: Sequence[dict],
    evaluation: Evaluation,
    pixels: Pixels,
    device: torch.device,
) -> list[Predicted]:
    """Return what is predicted for samples, one by one, on the CPU; those that cannot be read are left out.

    `logits_of` maps normalised images (1, C, h, w) to logits (1, K, ., .).
    """
    readable = [collate([sample]) for sample in samples if not sample["bad"]]
    found = []
    for batch in device_batches(readable, device, pixels):
        mask = batch["mask"][0]
        logits = evaluation.logits(logits_of, batch["image"])
        (prediction,) = evaluation.labels(logits, (mask.shape[0], mask.shape[1]))
        image = pixels.unnormalize(batch["image"])
        found.append(Predicted(image.cpu(), mask.cpu(), prediction.cpu()))
    return found


def describe(figures: Figures, classes: Sequence[str]) -> str:
    """Return the IoU of each class as text, of the first ones if there are many."""
    shown = [f"{printable(name)} {iou:.1f}" for name, iou in zip(classes, figures.ious)][:MOST_CLASSES]
    if len(classes) > MOST_CLASSES:
        shown.append("...")
    return ", ".join(shown)


def known(value: float) -> float:
    """Return a figure, or 0 where there is none (nan)."""
    if value != value:
        return 0.0
    return value


def best_of_sources(figures: dict[str, Figures]) -> dict[str, str]:
    """Return the name of the best setting of each source; names are `source/setting`."""
    best: dict[str, str] = {}
    for name, each in figures.items():
        source = name.partition("/")[0]
        if source not in best or known(each.miou) > known(figures[best[source]].miou):
            best[source] = name
    return best


def print_table(figures: dict[str, Figures], classes: Sequence[str]) -> None:
    """Print a line for the best setting of each source of features."""
    for source, name in best_of_sources(figures).items():
        each = figures[name]
        setting = name.partition("/")[2]
        dist.print_rank0(
            f"* {source}: mIoU {each.miou:.3f} pixel accuracy {each.pixel_accuracy:.3f} at {setting}; "
            f"{describe(each, classes)}"
        )


def stats_of(figures: dict[str, Figures]) -> dict[str, float]:
    """Return the figures of a table for log.txt, the best setting of each source and all settings."""
    stats: dict[str, float] = {}
    for source, name in best_of_sources(figures).items():
        stats[f"test_miou_{source}"] = known(figures[name].miou)
        stats[f"test_pixel_accuracy_{source}"] = known(figures[name].pixel_accuracy)
    return stats | {f"test_miou_{name.replace('/', '_')}": known(each.miou) for name, each in figures.items()}


@dataclass(frozen=True)
class Schedule:
    """A run of `epochs` evaluates after the first, each `eval_freq`-th and the last one."""

    eval_freq: int
    epochs: int

    def due(self, epoch: int) -> bool:
        return epoch % self.eval_freq == 0 or epoch + 1 == self.epochs


@dataclass
class DenseProbing(Objective):
    """Linear maps of frozen features, one for each source of features and each rate, in one pass.

    Heads share no parameters, so each one learns as if it were alone. `names` are `source/rate`, source by
    source, the encoder's first. Batches that have `features` skip the encoder.
    """

    probes: Probes
    sources: Sources
    names: list[str]
    setup: Setup
    evaluation: Evaluation
    val_loader: Batches[SegmentDataset]
    loss_at: str
    schedule: Schedule
    log: Log = field(init=False)

    def loss(self, model: torch.nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the heads' losses; `loss_head` is the lowest one."""
        logits = model(self.features(batch))  # (G, B, K, h, w)
        upsample = self.evaluation.protocol.upsample
        losses = losses_of_heads(logits, batch["mask"], self.loss_at, upsample)
        return losses.sum(), {"loss_head": losses.detach().min()}

    def features(self, batch: dict) -> Tensor:
        """Return the features (B, D, h, w) of a batch."""
        if "features" in batch:
            return batch["features"]
        return self.sources(batch["image"])

    def after_epoch(self, epoch: int, state: TrainState) -> dict[str, float]:
        if not self.schedule.due(epoch):
            return {}
        stats = stats_of(self.evaluate())
        miou = stats["test_miou_encoder"]
        if state.best is None or miou > state.best:
            state.best = miou
            state.best_epoch = epoch
        self.log.scalars({"perf/test_miou": miou}, epoch)
        return {"test_miou": miou} | stats

    def evaluate(self) -> dict[str, Figures]:
        """Grade all heads; print a line for the best one of each source."""
        self.probes.eval()
        figures = grade(self.logits, self.names, self.val_loader, self.evaluation, self.setup)
        print_table(figures, self.val_loader.dataset.classes)
        return figures

    def logits(self, batch: dict) -> Tensor:
        """Return the logits of all heads, (B, G * K, h, w), of images or of features."""
        if "features" in batch:
            return self._heads(batch["features"])
        return self.evaluation.logits(lambda images: self._heads(self.sources(images)), batch["image"])

    def _heads(self, features: Tensor) -> Tensor:
        return self.probes(features).transpose(0, 1).flatten(1, 2)  # (G, B, K, h, w) -> (B, G * K, h, w)
