"""Figures of segmentation against scikit-learn and torchmetrics, and predictions against slow loops."""

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix, jaccard_score, recall_score

from util.evaluate.segments import figures as segments
from util.evaluate.segments.figures import Confusion, Protocol, predict, to_labels

CPU = torch.device("cpu")
K = 5


def masks(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A prediction and a mask (2, 9, 7) of K classes, with ignored pixels."""
    g = torch.Generator().manual_seed(3)
    mask = torch.randint(-1, K, (2, 9, 7), generator=g)
    prediction = torch.where(
        torch.rand(mask.shape, generator=g) < 0.5, mask, torch.randint(0, K, mask.shape, generator=g)
    ).clamp(min=0)
    if kind in ("absent", "only predicted"):
        mask[mask == 2] = 1
    if kind == "absent":
        prediction[prediction == 2] = 3
    if kind == "ignored but predicted":
        mask[mask == 2] = -1
        prediction[prediction == 2] = 0
        prediction[mask == -1] = 2
    if kind == "one class":
        mask[mask >= 0] = 4
        prediction[:] = 4
    return prediction, mask


KINDS = ["random", "absent", "only predicted", "ignored but predicted", "one class"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.int16, torch.int64])
def test_figures_are_scikit_learns(kind, dtype):
    prediction, mask = masks(kind)
    confusion = Confusion(K, CPU, heads=2)
    # In two parts, and beside another head.
    for image in range(2):
        confusion.add(prediction[image], mask[image].to(dtype), head=1)
    found = confusion.figures(1)
    valid = (mask >= 0).numpy()
    truth = mask.numpy()[valid]
    guess = prediction.numpy()[valid]
    expected = confusion_matrix(truth, guess, labels=range(K))
    assert confusion.counts.dtype == torch.int64 and (confusion.counts[1].numpy() == expected).all()
    assert not confusion.counts[0].any()
    ious = 100 * jaccard_score(truth, guess, labels=range(K), average=None, zero_division=0)
    present = sorted({*truth, *guess})
    assert found.absent == [k for k in range(K) if k not in present]
    assert [k for k, iou in enumerate(found.ious) if math.isnan(iou)] == found.absent
    assert np.allclose(np.nan_to_num(found.ious), ious)
    assert found.miou == pytest.approx(ious[present].mean())
    assert found.miou_all == pytest.approx(ious.mean())
    assert found.pixel_accuracy == pytest.approx(100 * (truth == guess).mean())
    recalls = recall_score(truth, guess, labels=sorted(set(truth)), average="macro", zero_division=0)
    assert found.mean_accuracy == pytest.approx(100 * recalls)
    assert found.pixels == valid.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_torchmetrics(kind):
    jaccard = pytest.importorskip("torchmetrics.classification").MulticlassJaccardIndex
    prediction, mask = masks(kind)
    confusion = Confusion(K, CPU)
    confusion.add(prediction, mask)
    found = confusion.figures()
    ious = 100 * jaccard(K, average=None, ignore_index=-1)(prediction, mask)
    assert torch.allclose(torch.tensor(found.ious).nan_to_num(0), ious)
    mean = 100 * jaccard(K, average="macro", ignore_index=-1)(prediction, mask)
    assert found.miou == pytest.approx(mean.item(), rel=1e-6)


def test_imagenet_s_mean_counts_absent_classes_as_zero():
    """Two of four classes occur; one is right in full, the other one in one of two pixels."""
    confusion = Confusion(4, CPU)
    confusion.add(torch.tensor([0, 0, 1, 0]), torch.tensor([0, -1, 1, 1]))
    found = confusion.figures()
    assert found.ious[:2] == [50.0, 50.0] and found.absent == [2, 3]
    assert (found.miou, found.miou_all) == (50.0, 25.0)
    assert found.pixel_accuracy == pytest.approx(200 / 3) and found.mean_accuracy == 75.0


def test_without_counted_pixels_the_figures_are_nan():
    confusion = Confusion(3, CPU)
    confusion.add(torch.zeros(4, 4, dtype=torch.int64), torch.full((4, 4), -1))
    found = confusion.figures()
    assert found.pixels == 0 and found.absent == [0, 1, 2]
    figures = [*found.ious, found.miou, found.miou_all, found.pixel_accuracy, found.mean_accuracy]
    assert all(math.isnan(figure) for figure in figures)


@pytest.mark.parametrize("prediction, mask", [(0, 255), (3, 0), (0, -2), (-1, 0)])
def test_a_class_out_of_range_is_an_error(prediction, mask):
    confusion = Confusion(3, CPU)
    confusion.add(torch.tensor([0, prediction]), torch.tensor([0, mask]))
    with pytest.raises(ValueError, match="1 pixels have a class that is not one of 0 to 2"):
        confusion.figures()
    with pytest.raises(ValueError, match="bring them to one size"):
        confusion.add(torch.zeros(2, 3), torch.zeros(3, 2))


RANK = """
import torch
from util import dist
from util.evaluate.segments.figures import Confusion
dist.init("cpu")
prediction, mask = torch.load({path!r})
confusion = Confusion(5, torch.device("cpu"), heads=2)
image = dist.rank()
confusion.add(prediction[image], mask[image], head=1)
confusion.reduce()
# Above 2**24, where float32 would lose pixels.
large = Confusion(5, torch.device("cpu"))
large.counts[0, 1, 1] = 2**24 + 1 if dist.rank() else 2**30
large.reduce()
assert large.figures().pixels == 2**30 + 2**24 + 1
torch.save((confusion.counts, vars(confusion.figures(1))), {path!r} + str(dist.rank()))
dist.shutdown()
"""


@pytest.mark.slow
def test_two_ranks_count_what_one_counts(tmp_path):
    prediction, mask = masks("random")
    path = str(tmp_path / "masks")
    torch.save((prediction, mask), path)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    root = Path(__file__).parents[2]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK.format(path=path)],
            cwd=root,
            env=os.environ
            | {"RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        )
        for r in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    alone = Confusion(K, CPU, heads=2)
    alone.add(prediction, mask, head=1)
    for r in range(2):
        counts, figures = torch.load(path + str(r))
        assert torch.equal(counts, alone.counts)
        assert str(figures) == str(vars(alone.figures(1)))


# --- the protocol ---


def test_a_protocol_is_one_line_with_all_that_matters():
    size = "bilinear to the mask's size"
    slide = Protocol("shorter side 512", (512, 448), (341, 300), 255, 150, True)
    line = str(slide)
    assert "\n" not in line
    for part in ("shorter side 512", "512x448", "341x300", size, "255", "150 classes"):
        assert part in line
    assert "value 0 ignored" in line and "absent ones count as 0" in line
    assert slide.to_dict() == {
        "image": "shorter side 512",
        "window": [512, 448],
        "stride": [341, 300],
        "ignore": 255,
        "classes": 150,
        "reduce_zero_label": True,
        "max_res": None,
        "upsample": "bilinear",
    }
    whole = Protocol("shorter side 256", None, None, 1000, 920, max_res=1000)
    assert "whole image" in str(whole) and "1000x1000" in str(whole) and "window" not in str(whole)
    assert "no pixel ignored" in str(Protocol("x", None, None, None, 2))


def test_nearest_labels_are_constant_in_a_cell():
    logits = torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    expected = logits.argmax(1)[0].repeat_interleave(4, 0).repeat_interleave(2, 1)
    assert torch.equal(to_labels(logits, (12, 10), upsample="nearest"), expected)
    assert not torch.equal(to_labels(logits, (12, 10)), expected)


# --- predictions ---


def pixelwise(images: torch.Tensor) -> torch.Tensor:
    """A model without context."""
    return F.conv2d(images, torch.tensor([[1.0, -2.0, 0.5], [0.3, 1.0, -1.0]])[..., None, None])


def blurred(images: torch.Tensor) -> torch.Tensor:
    """A model with context and the resolution of 4x4 patches."""
    x = F.avg_pool2d(images, 4) + images.mean((2, 3), keepdim=True)
    return F.conv2d(x, torch.ones(2, 3, 3, 3) * torch.tensor([1.0, -0.3])[:, None, None, None], padding=1)


@pytest.mark.parametrize("size", [(16, 16), (17, 29), (8, 40), (5, 12), (6, 3)])
@pytest.mark.parametrize("stride", [(8, 8), (5, 3), (1, 8), None])
def test_a_sliding_window_sees_what_a_model_without_context_sees(size, stride):
    images = torch.randn(2, 3, *size)
    found = predict(pixelwise, images, (8, 8), stride, (4, 4))
    assert torch.allclose(found, pixelwise(images), atol=1e-6)


@pytest.mark.parametrize("size, window, stride", [((19, 30), (8, 12), (5, 7)), ((6, 20), (8, 12), (8, 12))])
def test_a_sliding_window_is_the_slow_loop(size, window, stride):
    images = torch.randn(2, 3, *size)
    found = predict(blurred, images, window, stride, (4, 4))
    H, W = (max(side, whole) for side, whole in zip(size, window))
    padded = torch.zeros(2, 3, H, W)
    padded[..., : size[0], : size[1]] = images
    values = [[[] for _ in range(W)] for _ in range(H)]
    tops = {min(top, H - window[0]) for top in range(0, H, stride[0])}
    lefts = {min(left, W - window[1]) for left in range(0, W, stride[1])}
    for top in tops:
        for left in lefts:
            logits = blurred(padded[:, :, top : top + window[0], left : left + window[1]])
            logits = F.interpolate(logits, size=window, mode="bilinear", align_corners=False)
            for y in range(window[0]):
                for x in range(window[1]):
                    values[top + y][left + x].append(logits[:, :, y, x])
    assert found.shape == (2, 2, *size)
    for y in range(size[0]):
        for x in range(size[1]):
            expected = torch.stack(values[y][x]).mean(0)
            assert torch.allclose(found[:, :, y, x], expected, atol=1e-5), (y, x)


def test_the_whole_image_loses_the_rest_or_is_resized():
    images = torch.randn(1, 3, 18, 31)
    seen = []

    def record(x):
        seen.append(x)
        return blurred(x)

    found = predict(record, images, None, None, (4, 4))
    assert torch.equal(seen[-1], images[..., :16, :28]) and torch.equal(found, blurred(images[..., :16, :28]))
    predict(record, images, None, None, (4, 4), remainder="resize")
    expected = F.interpolate(images, size=(20, 32), mode="bilinear", align_corners=False)
    assert torch.equal(seen[-1], expected)
    predict(record, images[..., :16, :28], None, None, (4, 4), remainder="resize")
    assert torch.equal(seen[-1], images[..., :16, :28])
    predict(record, images[..., :1, :], None, None, (4, 4), remainder="resize")
    assert seen[-1].shape[-2:] == (4, 32)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(window=(6, 8), stride=None), "no multiple of the patch"),
        (dict(window=(8, 8), stride=(9, 8)), "`stride`"),
        (dict(window=(8, 8), stride=(0, 8)), "`stride`"),
        (dict(window=None, stride=None, remainder="drop"), "cut or resize"),
    ],
)
def test_settings_that_cannot_be_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        predict(blurred, torch.zeros(1, 3, 16, 16), patch=(4, 4), **options)
    with pytest.raises(ValueError, match="smaller than a patch"):
        predict(blurred, torch.zeros(1, 3, 3, 16), None, None, (4, 4))


@pytest.mark.parametrize("size", [(64, 80), (14, 14), (33, 7), (5, 90), (1, 1)])
@pytest.mark.parametrize("grid", [(14, 14), (3, 9), (1, 1)])
def test_labels_in_strips_are_those_of_the_whole(size, grid, monkeypatch):
    logits = torch.randn(1, 11, *grid)
    whole = F.interpolate(logits.double(), size=size, mode="bilinear", align_corners=False)
    best = whole.topk(2, dim=1).values
    clear = (best[:, 0] - best[:, 1] > 1e-5)[0]
    assert clear.float().mean() > 0.99
    found = to_labels(logits, size, None)
    assert found.dtype == torch.int64 and found.shape == size
    assert torch.equal(found[clear], whole.argmax(1)[0][clear])
    # The rows of a strip do not depend on its size, to the last bit.
    for memory in (1, 4 * 11 * 90 * 3):
        monkeypatch.setattr(segments, "_STRIP_BYTES", memory)
        assert torch.equal(to_labels(logits, size, None), found)


def test_large_masks_get_smaller_predictions():
    """ImageNet-S: max_res on the longer side, the shorter one rounded down, argmax, then nearest."""
    logits = torch.randn(1, 7, 6, 4)
    for size, smaller in (((90, 61), (50, 33)), ((61, 90), (33, 50)), ((60, 60), (50, 50))):
        expected = F.interpolate(logits, size=smaller, mode="bilinear", align_corners=False).argmax(1)
        expected = F.interpolate(expected[:, None].float(), size=size, mode="nearest")[0, 0].long()
        found = to_labels(logits, size, 50)
        assert (found != expected).float().mean() < 1e-3
        assert (found != to_labels(logits, size, None)).any()
    # Of exactly 50 * 50 pixels, it is not large; 0 turns the rule off.
    assert torch.equal(to_labels(logits, (25, 100), 50), to_labels(logits, (25, 100), None))
    assert torch.equal(to_labels(logits, (90, 61), 0), to_labels(logits, (90, 61), None))
    assert to_labels(logits, (2, 5000), 50).shape == (2, 5000)


def test_equal_logits_give_the_first_class():
    assert not to_labels(torch.zeros(1, 4, 2, 2), (8, 8), None).any()
    assert to_labels(torch.zeros(1, 4, 2, 2, dtype=torch.bfloat16), (8, 8), None).dtype == torch.int64
