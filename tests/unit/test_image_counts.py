"""Counts of each image: their sums are the confusion matrix's, and resampled images are counted as often."""

import json
import re

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score

from evidence import records
from evidence.images import Pair, copy_counts, difference_table, draw_images, interval, kept_counts
from evidence.statistics import setting
from util.evaluate.segments.counting import ImageCounts
from util.evaluate.segments.figures import Confusion
from util.evaluate.segments.image_counts import FILE, read_image_counts

CLASSES = ("sky", "road", "tree", "never")
SETTINGS = ("encoder/a", "encoder/b", "position/a")


def maps(images=5, seed=0):
    """[(mask, a prediction for each setting)]; the third setting is right most often."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(images):
        mask = torch.as_tensor(rng.integers(-1, 3, (6, 7)))
        guesses = [torch.as_tensor(rng.integers(0, 3, (6, 7))) for _ in SETTINGS]
        guesses[2][:4] = mask[:4].clamp(min=0)
        guesses[1][:2] = mask[:2].clamp(min=0)
        found.append((mask, guesses))
    return found


def written(path, found):
    counts = ImageCounts(len(CLASSES))
    # Not in their order, as with several ranks.
    for number in reversed(range(len(found))):
        mask, guesses = found[number]
        counts.add(10 * number, guesses, mask)
    counts.write(str(path), lambda number: f"image-{number}.png", SETTINGS, CLASSES)
    return read_image_counts(str(path))


def test_all_images_together_give_the_figures_of_the_evaluation(tmp_path):
    found = maps()
    counted = written(tmp_path / FILE, found)
    assert counted.names == [f"image-{10 * i}.png" for i in range(5)] and counted.classes == list(CLASSES)
    for head, name in enumerate(SETTINGS):
        confusion = Confusion(len(CLASSES), torch.device("cpu"))
        for mask, guesses in found:
            confusion.add(guesses[head], mask)
        assert counted.miou(name) == pytest.approx(confusion.figures().miou, abs=1e-9)
    assert counted.best("encoder") == "encoder/b"
    with pytest.raises(ValueError, match="there are encoder/a, encoder/b"):
        counted.miou("pixels/a")
    with pytest.raises(ValueError, match="no setting of 'random'"):
        counted.best("random")


def test_images_that_are_drawn_twice_count_twice(tmp_path):
    found = maps()
    counted = written(tmp_path / FILE, found)
    weights = np.array([[2, 0, 1, 0, 1], [0, 0, 0, 1, 0]])
    for row, value in zip(weights, counted.miou("position/a", weights)):
        drawn = [found[i] for i, times in enumerate(row) for _ in range(times)]
        truth = torch.cat([mask.flatten() for mask, _ in drawn])
        guess = torch.cat([guesses[2].flatten() for _, guesses in drawn])
        seen = truth >= 0
        labels = sorted({*truth[seen].tolist(), *guess[seen].tolist()})
        expected = jaccard_score(truth[seen], guess[seen], labels=labels, average="macro", zero_division=0)
        assert value == pytest.approx(100 * expected)


def test_the_best_setting_of_each_source_is_kept(tmp_path):
    counted = written(tmp_path / FILE, maps())
    copy_counts(str(tmp_path / FILE), str(tmp_path / "copy.npz"))
    copied = read_image_counts(str(tmp_path / "copy.npz"))
    assert copied.settings == ["encoder/b"] and copied.names == counted.names
    np.testing.assert_array_equal(copied.counts[0], counted.counts[1])


@pytest.mark.parametrize("damage", [lambda b: b[:-30], lambda b: b"PK", lambda b: b""])
def test_damaged_counts_are_named(tmp_path, damage):
    path = tmp_path / FILE
    written(path, maps())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="has no counts of images, or is damaged"):
        read_image_counts(str(path))


def test_draws_take_whole_blocks_and_as_many_images():
    rng = np.random.default_rng(0)
    weights = draw_images(2000, 10, 1, rng)
    assert (weights.sum(1) == 10).all()
    # Of a multinomial distribution.
    assert weights.var(0).mean() == pytest.approx(0.9, rel=0.05)
    blocks = draw_images(2000, 10, 5, rng)
    assert (blocks.sum(1) == 10).all()
    assert (blocks[:, :-1] != blocks[:, 1:]).sum(1).max() <= 4, "two blocks have four ends"
    assert blocks.mean(0) == pytest.approx(np.ones(10), abs=0.1)


def test_the_interval_covers_seeds_and_images(tmp_path):
    same = written(tmp_path / "a.npz", maps())
    assert interval([Pair(same, same, "encoder")] * 2) == (0.0, 0.0)
    other = written(tmp_path / "b.npz", maps(seed=1))
    pairs = [Pair(same, other, "encoder"), Pair(other, same, "encoder")]
    low, high = interval(pairs)
    # The seeds contradict each other by the same amount, so that the interval lies around 0.
    difference = abs(float(pairs[0].differences(np.ones(5))))
    assert low <= -difference and high >= difference
    assert low == pytest.approx(-high, abs=0.5)
    one = interval(pairs[:1])
    assert one[0] < float(pairs[0].differences(np.ones(5))) < one[1]
    less = Pair(same, written(tmp_path / "c.npz", maps(4)), "encoder")
    with pytest.raises(ValueError, match="on other images"):
        interval([less])
    with pytest.raises(ValueError, match="no pair of runs"):
        interval([])


def test_results_keep_the_counts_and_compare_them_by_seed(tmp_path):
    figures = {}
    runs = []
    for seed, label in ((0, "apl"), (1, "apl"), (2, "apl"), (1, "none"), (2, "none")):
        name = f"seed={seed},pos_label={label}"
        folder = tmp_path / "runs" / name / "segment"
        folder.mkdir(parents=True)
        (folder.parent / "flags.json").write_text(json.dumps({"seed": seed, "pos_label": label}))
        for path in (folder.parent, folder):
            (path / "log.txt").write_text('{"epoch": 0, "test_miou": 1.0}\n')
        counted = written(folder / FILE, maps(seed=10 * seed + len(label)))
        figures[seed, label] = float(counted.miou("encoder/b"))
        runs.append({"name": name, "flags": {"seed": seed, "pos_label": label}})
    out = tmp_path / "results" / "streets"
    records.copy_logs(str(tmp_path / "runs"), str(out))
    kept = read_image_counts(kept_counts(str(out), runs[0]["name"], "segment"))
    assert kept.settings == ["encoder/b"]
    sides = {"apl - none": (setting("streets", pos_label="apl"), setting("streets", pos_label="none"))}
    rows = {"mIoU": ("segment", "encoder"), "absent": ("segment-2", "encoder")}
    results = {"streets": {"runs": runs}}
    text = difference_table(results, str(tmp_path / "results"), sides, rows).markdown()
    header, _, row = text.splitlines()
    assert header == "| mIoU | apl - none |" and "absent" not in text
    each = [figures[seed, "apl"] - figures[seed, "none"] for seed in (1, 2)]
    assert row.startswith(f"| mIoU | {np.mean(each):.2f} ± "), row
    # Both intervals of the bootstrap hold the mean.
    for low, high in re.findall(r"(-?[\d.]+) to (-?[\d.]+)", row):
        assert float(low) < np.mean(each) < float(high)
