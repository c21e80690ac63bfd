"""What grading leaves out, what predictions may not become, and controls that must not keep a trace."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from util.data.loading.loader import eval_loader
from util.data.pixels import Pixels
from util.data.segments.dataset import build_segment_dataset
from util.data.segments.masks import MaskSettings
from util.data.segments.transforms import SegmentEval
from util.data.segments.written import write_mask
from util.evaluate.position import PositionProjection
from util.evaluate.segments import loss, sources
from util.evaluate.segments.figures import Protocol
from util.evaluate.segments.grading import Evaluation, grade
from util.evaluate.segments.patch_memory import PatchMemory
from util.flags.data_path import DataPath
from util.train.setup import Setup


def data(root, masks="masks", train="train", val="val", odd=False):
    """Three images of 8 x 8 pixels a split, with masks of 1 and 2 and a row of 0."""
    for split in (train, val):
        for kind in ("images", masks):
            (root / kind / split).mkdir(parents=True)
        for number in range(3):
            mask = np.full((8, 8), 1 + number % 2, np.uint8)
            mask[0] = 0
            if odd and split == val and number == 1:
                mask[3, 3] = 77
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(root / f"images/{split}/{number}.png")
            Image.fromarray(mask).save(root / masks / split / f"{number}.png")
    return str(root)


def opened(path, split="val", **masks):
    return build_segment_dataset(DataPath(path), split, SegmentEval(), masks=masks, evaluation=True)


def graded(dataset):
    loader = eval_loader(dataset, batch_size=1, num_workers=0, pin_memory=False)
    protocol = Protocol("as it is", None, None, 255, len(dataset.classes))
    setup = Setup(torch.device("cpu"), "fp32", (8, 8), Pixels((0.0,), (1.0,)))
    logits = torch.zeros(1, len(dataset.classes), 8, 8)
    logits[:, 1] = 1
    return grade(lambda batch: logits, ["model"], loader, Evaluation(protocol, (8, 8)), setup)["model"]


def test_images_that_are_left_out_are_not_counted_and_have_a_reason(tmp_path, capsys):
    figures = graded(opened(data(tmp_path, odd=True), num_classes=3))
    assert figures.images == 2 and figures.pixels == 2 * 64
    text = capsys.readouterr().out
    assert "leaves out 1 image" in text and "1.png: its mask has the value 77" in text


def test_settings_of_masks_that_are_given_count_also_if_they_are_the_defaults(tmp_path):
    path = data(tmp_path / "ade", "annotations", "training", "validation")
    assert opened(path).settings == MaskSettings(150, 255, reduce_zero_label=True)
    given = dict(num_classes=3, reduce_zero_label=False)
    dataset = opened(path, **given)
    assert dataset.settings == MaskSettings(3, 255, reduce_zero_label=False)
    assert np.unique(dataset.decoded_mask(1)).tolist() == [0, 2], "0 is a class"
    # As validation images get them.
    assert opened(path, **vars(dataset.settings)).settings == dataset.settings
    for split in ("train-semi", "validation"):
        for end in ("", "-segmentation"):
            (tmp_path / "s" / f"{split}{end}" / "n01").mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "s" / f"{split}{end}" / "n01/1.png")
    assert opened(str(tmp_path / "s")).settings.ignore_index == 1000
    assert opened(str(tmp_path / "s"), ignore_index=255).settings.ignore_index == 255


def test_no_ignored_value_is_said_so():
    assert "no pixel ignored" in str(Protocol("as it is", None, None, -1, 2))


def test_a_projection_leaves_no_trace_of_positions_under_autocast():
    draws = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 6, generator=draws, dtype=torch.float64)).Q
    projection = PositionProjection(torch.zeros(64, dtype=torch.float64), basis)
    tokens = 10 * torch.randn(1000, 64, generator=draws)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        left = projection.remove(tokens)
    assert left.dtype == torch.float32
    assert (left.double() @ basis).abs().max() < 1e-5


@pytest.mark.parametrize("columns", [1, 256 * 2**20])
def test_patches_that_are_equally_near_do_not_depend_on_their_order(monkeypatch, columns):
    monkeypatch.setattr("util.evaluate.segments.patch_memory._MOVED_BYTES", columns)
    draws = torch.Generator().manual_seed(0)
    features = torch.eye(4)[torch.arange(40) % 4]
    labels = torch.eye(5)[torch.randint(5, (40,), generator=draws)]
    found = []
    for order in (torch.arange(40), torch.randperm(40, generator=draws)):
        memory = PatchMemory(4, 5, 40, torch.device("cpu"))
        memory.add(features[order], labels[order], order)
        memory.gather()
        found.append(memory.scores(torch.eye(4), k=3))
    assert torch.equal(*found)


def test_features_that_do_not_fit_into_memory_are_one_line(monkeypatch):
    monkeypatch.setattr(sources, "available_memory", lambda: 1e9)
    sources.check_room(100, torch.zeros(1, 100, 10, 10), "DIR")
    with pytest.raises(ValueError, match=r"of 30000 images of DIR would take 1\.2 GB, and 1\.0 GB"):
        sources.check_room(30000, torch.zeros(1, 100, 10, 10), "DIR")


def test_predictions_are_whole_files(tmp_path, monkeypatch):
    path = Path(write_mask(str(tmp_path), "a/1.jpg", torch.ones(4, 4)))
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        write_mask(str(tmp_path), "a/1.jpg", torch.zeros(4, 4))
    assert path.read_bytes() == before and len(list(tmp_path.rglob("*.*"))) == 1


# --- the loss ---


@pytest.mark.parametrize("size", [(24, 40), (17, 9), (3, 5), (2, 3)])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
def test_the_loss_in_strips_is_torchs(monkeypatch, size, ignored):
    monkeypatch.setattr(loss, "STRIP_BYTES", 2000)
    draws = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 4, 3, 5, generator=draws)).requires_grad_()
    mask = torch.randint(0, 4, (2, *size), generator=draws, dtype=torch.int16)
    mask[torch.rand(mask.shape, generator=draws) < ignored] = -1
    whole = F.interpolate(logits.double(), size=size, mode="bilinear", align_corners=False)
    expected = F.cross_entropy(whole, mask.long(), ignore_index=-1, reduction="sum")
    expected = 3 * expected / max(1, int((mask >= 0).sum()))
    (slope,) = torch.autograd.grad(expected, logits)
    found = 3 * loss.segment_loss(logits, mask, "pixels")
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(found, logits)
    assert torch.allclose(gradient, slope, atol=1e-6)
    heads = loss.losses_of_heads(torch.stack([logits, 2 * logits]), mask, "pixels")
    assert heads[0] == loss.segment_loss(logits, mask, "pixels") and len(heads) == 2
    # At twice the size of the logits: another path, in which masks are resized.
    reduced = F.interpolate(mask[:, None].float(), size=(6, 10), mode="nearest")[:, 0].long()
    whole = F.interpolate(logits.double(), size=(6, 10), mode="bilinear", align_corners=False)
    expected = F.cross_entropy(whole, reduced, ignore_index=-1, reduction="sum")
    twice = loss.segment_loss(logits, mask, "twice")
    assert twice.item() == pytest.approx(expected.item() / max(1, int((reduced >= 0).sum())), rel=1e-6)
    # As on a GPU.
    elsewhere = loss._loss(logits, reduced, loss.counted_pixels(reduced), "bilinear")
    assert elsewhere.item() == pytest.approx(twice.item(), rel=1e-6)
    nearest = loss.losses_of_heads(torch.stack([logits, 2 * logits]), mask, "pixels", "nearest")
    whole = F.interpolate(logits.double(), size=size, mode="nearest-exact")
    expected = F.cross_entropy(whole, mask.long(), ignore_index=-1, reduction="sum")
    assert nearest[0].item() == pytest.approx(expected.item() / max(1, int((mask >= 0).sum())), rel=1e-6)
