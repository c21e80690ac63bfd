"""The published command of ImageNet-S (and SERE) runs with its flags, on a small set of that form."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from processes import here

# As in the README of the published code, without the launcher, and with a small model and few epochs.
PUBLISHED = (
    "--accum_iter 1 --batch_size 4 --epochs 2 --nb_classes 3 --blr 5e-4 --layer_decay 0.50 "
    "--weight_decay 0.05 --drop_path 0.1 --dist_eval --eval_freq 1 --max_res 30 --saveckp_freq 20 "
    "--min_lr 1e-6 --warmup_epochs 1 --dist_url env:// --world_size 1 --num_workers 0 --pin_mem"
)
IGNORED = 1000


def write(root, split, count):
    """Images of two classes: the object covers a part of the other pixels, and its border is ignored."""
    draws = np.random.default_rng(len(split))
    for number, name in enumerate(("n01440764", "n01443537"), start=1):
        images, masks = Path(root, split, name), Path(root, f"{split}-segmentation", name)
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for i in range(count):
            height, width = draws.integers(36, 60, 2)
            classes = np.zeros((height, width), np.int64)
            classes[8:28, 6:26] = IGNORED
            classes[10:26, 8:24] = number
            pixels = draws.integers(0, 60, (height, width, 3))
            pixels[classes == number, number] = 250
            Image.fromarray(pixels.astype(np.uint8)).save(images / f"{name}_{i}.JPEG")
            # Red, and 256 times green.
            stored = np.stack([classes % 256, classes // 256, np.zeros_like(classes)], -1)
            Image.fromarray(stored.astype(np.uint8)).save(masks / f"{name}_{i}.png")


def test_the_published_command_trains_and_its_figure_is_imagenet_s(tmp_path):
    data = tmp_path / "ImageNetS"
    write(data, "train-semi", 8)
    write(data, "validation", 3)
    small = ["main_segment", "--model", "vit_test", "--input_size", "32", "--device", "cpu"]
    code, text = here(tmp_path / "out", *PUBLISHED.split(), "--data_path", data, main=small)
    assert code == 0, text
    assert "mask value 1000 ignored" in text and "shorter side 37" in text and "3 classes" in text
    evaluate = ["--eval", "--resume", tmp_path / "out", "--data_path", data, "--max_res", "30"]
    code, text = here("", *evaluate, "--predictions", tmp_path / "p", main=small)
    assert code == 0, text
    found = float(re.findall(r"over all classes ([\d.]+)", text)[-1])
    counts = np.zeros((3, 3))
    for path in sorted((data / "validation-segmentation").rglob("*.png")):
        stored = np.asarray(Image.open(path)).astype(np.int64)
        truth = stored[..., 0] + 256 * stored[..., 1]
        predicted = np.asarray(Image.open(next((tmp_path / "p").rglob(path.name))))
        assert predicted.shape == truth.shape
        known = truth != IGNORED
        np.add.at(counts, (truth[known], predicted[known]), 1)
    right = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - right
    expected = 100 * np.mean(right / np.maximum(union, 1))
    assert abs(found - expected) < 1e-3
