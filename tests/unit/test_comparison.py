"""The table of several probes: names of encoders, rows that are read back, and protocols that differ."""

import json
import os

import pytest

from util.report import comparison
from util.report.comparison import Row, figures_of, names_of, read_rows, stamp, tables, write_rows


def test_encoders_are_named_after_their_file_or_run(tmp_path):
    (tmp_path / "v1.5").mkdir()
    run = str(tmp_path / "v1.5")
    assert names_of([run]) == names_of([f"{run}/checkpoint-last.pth"]) == ["v1.5"]
    assert names_of(["a/b/mae.pth", "https://host/x/vit%20b.pth?download=1"]) == ["mae", "vit_20b"]
    assert names_of(["run/checkpoint-0099.pth"]) == ["run-checkpoint-0099"]
    assert names_of(["a/x/m.pth", "b/x/m.pth", "c/n.pth"]) == ["a-x-m", "b-x-m", "n"]
    assert names_of(["a/m.pth", "b/m.pth"]) == ["a-m", "b-m"]
    with pytest.raises(ValueError, match=r"`finetune` names .*v1\.5 twice"):
        names_of([run, f"{run}/checkpoint-last.pth"])


def test_rows_come_back_and_damaged_ones_are_left_out(tmp_path, capsys):
    assert read_rows(str(tmp_path)) == {}
    rows = {"a": Row({"encoder": 50.126}, "p", {"flags": {"lr_grid": [1.0], "x": None}, "stamp": [3, 4]})}
    write_rows(str(tmp_path), rows)
    assert read_rows(str(tmp_path)) == rows
    written = json.loads((tmp_path / "table.json").read_text())
    (tmp_path / "table.json").write_text(json.dumps(written | {"b": {"figures": {}}, "c": 3}))
    assert read_rows(str(tmp_path)) == rows and capsys.readouterr().err.count("is damaged") == 2
    (tmp_path / "table.json").write_text("{")
    assert read_rows(str(tmp_path)) == {}


def test_figures_of_different_protocols_are_in_different_tables(tmp_path):
    rows = {
        "a": Row({"encoder": 50.126, "pixels": 20.0}, "protocol: 32x32", {}),
        "b": Row({"encoder": 40.0}, "protocol: 64x64", {}),
        "c": Row({"encoder": 30.0, "random": 10.0}, "protocol: 32x32", {}),
    }
    (first, one), (second, two) = tables(rows)
    assert (first, second) == ("protocol: 32x32", "protocol: 64x64")
    assert one.header == ["mIoU", "encoder", "pixels", "random"]
    assert one.rows == [["a", "50.13", "20.00", "-"], ["c", "30.00", "-", "10.00"]]
    assert two.header == ["mIoU", "encoder"] and two.rows == [["b", "40.00"]]
    write_rows(str(tmp_path), rows)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("protocol")] == [first, second]
    assert lines[:2] == ["protocol: 32x32", ""] and lines.count("") == 3


def test_figures_are_those_of_the_last_start(tmp_path):
    assert figures_of(str(tmp_path), 0, ["encoder"]) == {}
    lines = [
        {"epoch": 0, "test_miou_encoder": 1.0, "test_miou_encoder_k5": 9.0},
        {"epoch": 0, "test_miou_encoder": 2.0, "test_miou": 2.0},
        {"epoch": 1, "loss": 3.0},
    ]
    (tmp_path / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert figures_of(str(tmp_path), 0, ["encoder", "pixels"]) == {"encoder": 2.0}
    assert figures_of(str(tmp_path), 1, ["encoder"]) == {}


def test_a_changed_file_is_seen(tmp_path):
    file = tmp_path / "run" / comparison.LAST_CHECKPOINT
    file.parent.mkdir()
    file.write_bytes(b"abc")
    before = stamp(str(file.parent))
    assert before == stamp(str(file)) and before[0] == 3
    os.utime(file, ns=(0, 5))
    assert stamp(str(file.parent)) == [3, 5]
    assert stamp("https://host/a.pth") == []
