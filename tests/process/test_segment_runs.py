"""Whole runs of main_segment.py: fine-tuning, evaluation, probes with controls, kill and resume, ranks."""

import json
import re
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from processes import COMMON, FINETUNE, assert_same, here, last, log_lines, ranks, start
from util.evaluate.segments.image_counts import FILE, read_image_counts

SEGMENT = ["main_segment", "--model", "vit_test", *COMMON, "--batch_size", "4", "--no-photo"]
PROBE = [*SEGMENT, "--probe", "linear", "--blr", "1", "--lr_grid", "1"]
SIDE = 32
PATCH = 8


def pairs(root, label_of, train=12, val=6, side=SIDE):
    """Images of random colours in each patch, with a label that is constant in a patch.

    label_of(colour (3,), row, column) is the class of a patch.
    """
    draws = np.random.default_rng(0)
    cells = side // PATCH
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "masks"):
            Path(root, kind, split).mkdir(parents=True)
        for number in range(count):
            # Bright or dark.
            colours = draws.integers(0, 90, (cells, cells, 3)) + 160 * draws.integers(0, 2, (cells, cells, 1))
            labels = np.array(
                [[label_of(colours[i, j], i, j) for j in range(cells)] for i in range(cells)], np.uint8
            )
            big = np.ones((PATCH, PATCH, 1), int)
            Image.fromarray(np.kron(colours, big).astype(np.uint8)).save(
                f"{root}/images/{split}/{number:02d}.png"
            )
            Image.fromarray(np.kron(labels, big[..., 0]).astype(np.uint8)).save(
                f"{root}/masks/{split}/{number:02d}.png"
            )
    return root


def bright(colour, row, column):
    return int(colour.mean() > 127)


def place(colour, row, column):
    return (2 * row + column) % 3


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    out = tmp_path_factory.mktemp("encoder")
    code, text = here(out, "--epochs", 1, "--batch_size", 20)
    assert code == 0, text
    return out / "checkpoint-last.pth"


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return pairs(tmp_path_factory.mktemp("colours") / "set", bright)


def ok(result):
    code, text = result
    assert code == 0, text
    return text


def miou(text, row="model"):
    """The last figure of a row of the table, or of fine-tuning."""
    if row == "model":
        return float(re.findall(r"\* mIoU ([\d.]+)", text)[-1])
    return float(re.findall(rf"\* {row}: mIoU ([\d.]+)", text)[-1])


def test_finetune_kill_resume_and_evaluate(colours, encoder, tmp_path):
    run = ["--data_path", colours, "--finetune", encoder, "--epochs", 3, "--eval_freq", 2]
    whole = tmp_path / "whole"
    text = ok(here(whole, *run, main=SEGMENT))
    assert "12 pairs" in text or "12 images" in text, text
    assert text.count("* mIoU") == 2, "after the first and the last epoch, and each second one"
    best = miou(text)
    # 3 updates an epoch.
    code, text = start(tmp_path / "killed", *run, "--save_steps", 1, main=SEGMENT, TEST_SIGNAL="0:5:SIGKILL")
    assert code == -signal.SIGKILL, text
    ok(start(tmp_path / "killed", *run, main=SEGMENT))
    assert_same(last(whole), last(tmp_path / "killed"))
    assert log_lines(whole) == log_lines(tmp_path / "killed")
    folder = tmp_path / "predictions"
    text = ok(
        here(
            "",
            "--data_path",
            colours,
            "--eval",
            "--resume",
            whole / "checkpoint-last.pth",
            "--predictions",
            folder,
            main=SEGMENT,
        )
    )
    assert miou(text) == best
    # The figure again, from the files.
    counts = np.zeros((2, 2), int)
    for path in sorted(folder.rglob("*.png")):
        truth = np.asarray(Image.open(colours / "masks/val" / path.name))
        np.add.at(counts, (truth, np.asarray(Image.open(path))), 1)
    assert counts.sum() == 6 * SIDE * SIDE
    right = counts.diagonal()
    expected = 100 * np.mean(right / (counts.sum(0) + counts.sum(1) - right))
    assert abs(best - expected) < 1e-3
    # The encoder goes on, into a classifier too.
    flags = ["--finetune", whole / "checkpoint-last.pth", "--epochs", 1]
    ok(here(tmp_path / "classifier", *flags, "--max_steps", 1, main=FINETUNE))


def test_two_ranks_grade_as_one(colours, encoder, tmp_path):
    run = ["--data_path", colours, "--finetune", encoder, "--epochs", 1]
    ok(here(tmp_path, *run, main=SEGMENT))
    evaluate = ["--data_path", colours, "--eval", "--resume", tmp_path / "checkpoint-last.pth"]
    evaluate.append("--image_counts")
    alone = ok(here(tmp_path / "alone", *evaluate, main=SEGMENT))
    first, second = ranks(2, tmp_path / "ranks", *evaluate, main=SEGMENT)
    assert first[0] == second[0] == 0, first[1] + second[1]
    line = re.findall(r"\* mIoU.*|IoU: .*", alone)
    assert line and line == re.findall(r"\* mIoU.*|IoU: .*", first[1])
    one, two = (read_image_counts(str(tmp_path / name / FILE)) for name in ("alone", "ranks"))
    assert one.names == two.names == [f"{number:02d}.png" for number in range(6)]
    np.testing.assert_array_equal(one.counts, two.counts)
    assert float(one.miou("model")) == pytest.approx(miou(alone), abs=1e-3)


def test_two_ranks_train_as_one_however_many_pixels_count_on_each(encoder, tmp_path):
    data = pairs(tmp_path / "set", bright)
    for path in sorted(data.glob("masks/train/*.png"))[::2]:
        mask = np.array(Image.open(path))
        mask[1:] = 255
        Image.fromarray(mask).save(path)
    run = ["--data_path", data, "--finetune", encoder, "--epochs", 1, "--drop_path", 0]
    ok(here(tmp_path / "one", *run, main=SEGMENT))
    results = ranks(2, tmp_path / "two", *run, "--batch_size", 2, main=SEGMENT)
    assert [code for code, _ in results] == [0, 0], results
    one, two = (log_lines(tmp_path / name)[-1] for name in ("one", "two"))
    for name in ("train_loss", "train_grad_norm"):
        assert two[name] == pytest.approx(one[name], rel=1e-5)


CONTROLLED = [
    *PROBE,
    "--upsample",
    "nearest",
    "--controls",
    "--cached",
    "--hflip",
    "0",
    "--epochs",
    "60",
    "--eval_freq",
    "60",
]


def test_labels_of_places_are_read_from_the_place(encoder, tmp_path):
    data = pairs(tmp_path / "set", place)
    text = ok(here(tmp_path / "out", "--data_path", data, "--finetune", encoder, main=CONTROLLED))
    assert miou(text, "position") == 100 and miou(text, "with_position") == 100
    assert miou(text, "pixels") < 60, "colours tell nothing about the place"
    assert miou(text, "without_position") < 60


def test_labels_of_colours_are_read_from_the_pixels(colours, encoder, tmp_path):
    text = ok(here(tmp_path / "out", "--data_path", colours, "--finetune", encoder, main=CONTROLLED))
    assert miou(text, "pixels") == 100 and miou(text, "position") < 60


def test_a_killed_probe_ends_with_the_same_bits(colours, encoder, tmp_path):
    run = ["--data_path", colours, "--finetune", encoder, "--epochs", 3, "--controls"]
    text = ok(here(tmp_path / "whole", *run, main=PROBE))
    code, out = start(tmp_path / "killed", *run, "--save_steps", 1, main=PROBE, TEST_SIGNAL="0:5:SIGKILL")
    assert code == -signal.SIGKILL, out
    ok(start(tmp_path / "killed", *run, main=PROBE))
    assert_same(last(tmp_path / "whole"), last(tmp_path / "killed"))
    evaluate = ["--data_path", colours, "--finetune", encoder, "--controls", "--eval"]
    again = ok(here("", *evaluate, "--resume", tmp_path / "whole/checkpoint-last.pth", main=PROBE))
    rows = re.findall(r"\* \w+: mIoU.*", text)[-6:]
    assert len(rows) == 6 and re.findall(r"\* \w+: mIoU.*", again) == rows


def test_a_probe_is_evaluated_as_it_was_trained(colours, encoder, tmp_path):
    probe = [*PROBE[:-1], "1", "3", "--controls", "--layers", "0", "--seed", "3", "--upsample", "nearest"]
    run = ["--data_path", colours, "--finetune", encoder, "--epochs", 1, "--input_size", 64]
    rows = re.findall(r"\* \w+: mIoU.*", ok(here(tmp_path, *run, main=probe)))
    evaluate = ["main_segment", "--device", "cpu", "--num_workers", "0", "--eval", "--probe", "linear"]
    evaluate += ["--data_path", str(colours), "--resume", str(tmp_path / "checkpoint-last.pth")]
    text = ok(here("", main=evaluate))
    assert len(rows) == 6 and re.findall(r"\* \w+: mIoU.*", text) == rows
    for flags in (["--layers", 1], ["--seed", 4], ["--lr_grid", 1, 2]):
        code, text = here("", *flags, main=evaluate)
        assert code == 2 and f"trained with another {flags[0]}" in text, text


def test_images_of_16_bits_have_no_photometric_augmentation(tmp_path, encoder):
    tifffile = pytest.importorskip("tifffile")
    data = pairs(tmp_path / "set", bright)
    for path in sorted(data.glob("images/*/*.png")):
        tifffile.imwrite(path.with_suffix(".tif"), np.asarray(Image.open(path)).astype(np.uint16) * 257)
        path.unlink()
    flags = ["--data_path", data, "--finetune", encoder, "--epochs", 1, "--range", 0, 65535]
    text = ok(here(tmp_path / "out", *flags, main=[word for word in SEGMENT if word != "--no-photo"]))
    assert "12 uint16" in text


def test_retrieval_reads_colours_and_places(colours, encoder, tmp_path):
    knn = [*SEGMENT, "--probe", "knn", "--controls", "--knn_k", "5", "--upsample", "nearest"]
    text = ok(here(tmp_path / "a", "--data_path", colours, "--finetune", encoder, main=knn))
    assert miou(text, "pixels") == 100 and "protocol:" in text
    data = pairs(tmp_path / "set", place)
    text = ok(here(tmp_path / "b", "--data_path", data, "--finetune", encoder, main=knn))
    assert miou(text, "position") == 100
    alone = re.findall(r"\* \w+: mIoU.*", text)
    results = ranks(2, tmp_path / "c", "--data_path", data, "--finetune", encoder, main=knn)
    assert [code for code, _ in results] == [0, 0], results
    assert re.findall(r"\* \w+: mIoU.*", results[0][1]) == alone


def test_logistic_regression_reads_places_on_any_number_of_ranks(encoder, tmp_path):
    data = pairs(tmp_path / "set", place)
    flags = ["--probe", "logistic", "--controls", "--logistic_c", "1", "0.01", "1", "--upsample", "nearest"]
    run = ["--data_path", data, "--finetune", encoder]
    text = ok(here(tmp_path / "a", *run, main=[*SEGMENT, *flags]))
    assert miou(text, "position") == 100 and miou(text, "with_position") == 100
    assert miou(text, "pixels") < 60, "colours tell nothing about the place"
    assert "on 192 patches of 12 training images; of 2 penalties the best one on the validation" in text
    assert len(re.findall(r"\n\w+: updates at C 0.01 \d+, C 1 \d+\n", text)) > 1
    (line,) = log_lines(tmp_path / "a")
    assert line["test_miou_position"] == 100 == line["test_miou_position_C1"] and line["epoch"] == 0
    assert json.loads((tmp_path / "a/run.json").read_text())["flags"]["probe"] == "logistic"
    results = ranks(2, tmp_path / "b", *run, main=[*SEGMENT, *flags])
    assert [code for code, _ in results] == [0, 0], results
    for lines in (r"\* \w+: mIoU.*", r"\w+: updates.*"):
        assert re.findall(lines, results[0][1]) == re.findall(lines, text)
    text = ok(here(tmp_path / "c", *run, "--knn_memory", 50, main=[*SEGMENT, *flags]))
    assert "on 50 patches of 12" in text


@pytest.fixture(scope="module")
def other(encoder, tmp_path_factory):
    """An encoder that hardly sees the image, in a file of its own name."""
    saved = torch.load(encoder, weights_only=True)
    saved["model"]["patch_embed.proj.weight"] *= 1e-4
    path = tmp_path_factory.mktemp("files") / "other.pth"
    torch.save(saved, path)
    return path


def rows(text):
    """The lines of the printed tables: names and figures."""
    return dict(re.findall(r"\n(\S+)((?:  +[\d.]+)+)(?=\n)", text))


def test_several_encoders_make_one_table(colours, encoder, other, tmp_path):
    main = [*SEGMENT, "--probe", "knn", "--controls", "--data_path", str(colours)]
    alone = {}
    for name, file in ((encoder.parent.name, encoder), ("other", other)):
        text = ok(here(tmp_path / f"alone-{name}", "--finetune", file, main=main))
        alone[name] = [miou(text, row) for row in ("encoder", "pixels", "random")]
    assert alone["other"][0] != alone[encoder.parent.name][0]
    out = tmp_path / "table"
    both = ["--finetune", encoder.parent, other]
    text = ok(here(out, *both, main=main))
    table = rows(text)
    assert list(table) == list(alone)
    for name, figures in alone.items():
        found = [float(cell) for cell in table[name].split()]
        columns = re.findall(r"mIoU +(encoder.*)", text)[0].split()
        assert [found[columns.index(row)] for row in ("encoder", "pixels", "random")] == [
            pytest.approx(figure, abs=0.006) for figure in figures
        ]
        assert len(log_lines(out / name)) == 1 and (out / name / "run.json").exists()
    shown = (out / "table.md").read_text()
    assert shown.startswith("protocol: image resized to 32x32") and shown.count("\n| other ") == 1
    # Nothing is done twice, and a third encoder comes in front.
    third = tmp_path / "third.pth"
    third.write_bytes(other.read_bytes())
    text = ok(here(out, "--finetune", third, encoder.parent, other, main=main))
    assert text.count("is done already") == 2 and text.count("are remembered") == 1
    assert rows(text) == {"third": table["other"], **table}
    # What was made with other flags, or of another file, is made again.
    text = ok(here(out, *both, "--knn_k", 1, main=main))
    assert "is done already" not in text and len(log_lines(out / "other")) == 2
    third.write_bytes(encoder.read_bytes())
    text = ok(here(out, "--finetune", third, other, "--knn_k", 1, main=main))
    assert text.count("other is done already") == 1 and text.count("are remembered") == 1


def test_a_stop_ends_the_whole_table_and_the_same_command_continues_it(colours, encoder, other, tmp_path):
    main = [*PROBE, "--epochs", "2", "--data_path", str(colours), "--finetune", str(encoder), str(other)]
    whole = ok(here(tmp_path / "whole", main=main))
    # 3 updates an epoch: the second one of the second encoder.
    code, text = here(tmp_path / "stopped", main=main, signal="0:7:SIGTERM")
    assert code == 75 and "stopped by SIGTERM" in text, text
    assert not (tmp_path / "stopped/other/log.txt").exists()
    text = ok(here(tmp_path / "stopped", main=main))
    assert text.count("is done already") == 1 and text.count("continuing ") == 1
    assert rows(text) == rows(whole) and list(rows(text)) == [encoder.parent.name, "other"]
    assert_same(last(tmp_path / "whole/other"), last(tmp_path / "stopped/other"))


@pytest.mark.parametrize("probe", [["knn"], ["logistic"], ["linear", "--cached", "--epochs", 1]])
def test_a_probe_does_not_lose_training_images_in_silence(colours, encoder, tmp_path, probe):
    data = tmp_path / "set"
    shutil.copytree(colours, data)
    Image.new("L", (16, 16)).save(data / "masks/train/05.png")
    run = ["--probe", *probe, "--data_path", data, "--finetune", encoder]
    code, text = here(tmp_path / "strict", *run, main=SEGMENT)
    reason = "05.png: its image has 32 x 32 pixels, and its mask 16 x 16"
    assert code == 2 and "1 of 12 images (8.3%) cannot be decoded, more than --max_bad_images 0.01" in text
    assert text.splitlines()[-1].count(reason) == 1
    text = ok(here(tmp_path / "lax", *run, "--max_bad_images", 0.1, main=SEGMENT))
    assert f"skipping 1 image that cannot be decoded, the latest: {reason}" in text
    assert ("11 training images" in text) == (probe[0] != "linear")


def test_tars_are_folders(colours, encoder, tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for path in sorted(colours.rglob("*.png")):
            tar.add(path, path.relative_to(colours))
    run = ["--finetune", encoder, "--epochs", 1]
    ok(here(tmp_path / "folder", "--data_path", colours, *run, main=SEGMENT))
    ok(here(tmp_path / "tar", "--data_path", tmp_path / "set.tar", *run, main=SEGMENT))
    assert log_lines(tmp_path / "folder") == log_lines(tmp_path / "tar")


def test_sliding_windows_and_rectangles(tmp_path, encoder):
    data = pairs(tmp_path / "set", bright, side=64)
    run = ["--data_path", data, "--finetune", encoder, "--epochs", 1, "--eval_images", "own"]
    text = ok(here(tmp_path / "out", *run, "--window", 32, "--stride", 16, 32, main=SEGMENT))
    assert "window 32x32" in text and "stride 16x32" in text
    text = ok(here(tmp_path / "wide", *run, "--input_size", 32, 64, main=SEGMENT))
    assert torch.isfinite(torch.tensor(miou(text)))


KNN = ["--probe", "knn", "--controls", "--finetune", "{encoder}"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--probe", "linear"], "--probe needs --finetune"),
        (["--controls"], "--controls belongs to --probe"),
        (["--eval"], "--eval needs --resume FILE"),
        (["--stride", "8"], "--stride is the step between windows"),
        (["--cache_data", "memory"], "--cache_data keeps images without their masks"),
        (["--probe", "knn", "--cached", "--finetune", "{encoder}"], "--probe knn trains nothing"),
        (["--probe", "logistic", "--resume", "x", "--finetune", "{encoder}"], "--probe logistic solves for"),
        ([*KNN, "--head", "linear"], "--head belongs to fine-tuning"),
        ([*KNN, "--layer_decay", "0.75"], "--layer_decay belongs to fine-tuning"),
        (["--finetune", "{encoder}", "{data}"], "several files of --finetune make a table of probes"),
        ([*KNN, "{data}", "--max_steps", "1"], "are probed one after the other"),
        ([*KNN, "{data}", "--output_dir", ""], "several files of --finetune need --output_dir"),
        ([*KNN, "{encoder}"], "twice: a table has one row for each encoder"),
        (["--num_classes", "1"], "num_classes"),
        (["--probe", "linear", "--finetune", "{encoder}", "--predictions", "x"], "leave it out with --probe"),
        (["--predictions", "{data}/masks/val"], "--predictions lies in --data_path"),
        (["--window", "30"], "--window (30, 30) is no multiple of the patch"),
        (["--window", "32", "--stride", "48"], "--stride (48, 48) must be from 1"),
        (["--model", "swin_tiny"], "--model swin_tiny reads images of one size"),
        ([*KNN, "--window", "64", "--eval_images", "own"], "that of --input_size: --window 32 32"),
    ],
)
def test_mistakes_are_one_line(colours, encoder, tmp_path, flags, message):
    words = [word.format(encoder=encoder, data=colours) for word in flags]
    code, text = here(tmp_path, "--data_path", colours, *words, main=SEGMENT)
    assert code == 2 and message in text and "Epoch:" not in text, text
