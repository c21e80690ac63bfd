"""Charts, tables and pages of runs whose files are damaged, and whose names hold any characters."""

import base64
import html
import json
import os
import re
import xml.etree.ElementTree as ElementTree

import pytest
from PIL import Image

import evidence.__main__ as evidence
import visualize
from evidence import records
from evidence.experiments import EXPERIMENTS
from processes import ROOT
from util.flags.parser import run
from util.report import charts, runs
from util.report.aggregate import aggregate
from util.report.labels import LONGEST, chart_text
from util.report.page import page
from util.report.tables import Table

GOOD = '{"epoch": 0, "train_position": 2.5, "test_position": 3.0}\n'
DAMAGED = ["", "{", "[]", "5", '"text"', "null", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\0\xff"]
LINES = [
    "[]",
    "5",
    '{"train_loss": 1}',
    '{"epoch": "0"}',
    '{"epoch": true}',
    '{"epoch": -1}',
    '{"epoch": 1e9}',
]
LINES += ['{"epoch": 1, "train_position": "NaN"}', '{"epoch": 1, "train_position": [1]}', "[" * 100_000]
LINES += ['{"epoch": 1, "train_position": 1e300}', '{"epoch": ' + "9" * 5000 + "}", '{"epoch": 1,', "\xff"]


@pytest.fixture
def sweep(tmp_path):
    """Three runs with different flags."""
    points = [{"name": f"lr={i}", "flags": {"lr": i}} for i in range(3)]
    for point in points:
        folder = tmp_path / "s" / point["name"]
        folder.mkdir(parents=True)
        (folder / "log.txt").write_text(GOOD)
        (folder / "flags.json").write_text(json.dumps(point["flags"]))
    (tmp_path / "s" / "sweep.json").write_text(
        json.dumps({"sweep": {"lr": ["0", "1", "2"]}, "points": points})
    )
    return tmp_path / "s"


def read(folder) -> tuple[runs.Sweep, list[str]]:
    """A sweep, and the messages about its damaged files."""
    messages: list[str] = []
    return runs.read_sweep(str(folder), messages.append), messages


@pytest.mark.parametrize("line", LINES)
def test_damaged_lines_of_a_log_are_left_out_and_named(sweep, line):
    path = sweep / "lr=1" / "log.txt"
    path.write_text(GOOD + line + "\n" + GOOD.replace("0", "1", 1))
    records, messages = read(sweep)
    assert [len(record.log) for record in records.runs] == [1, 2, 1]
    (message,) = messages
    assert message.startswith(f"{path} has damaged lines, which are left out (1, the first is line 2: ")
    # An incomplete last line is no damage: the run is writing it.
    path.write_text(GOOD + line)
    assert read(sweep)[1] == []


@pytest.mark.parametrize("content", ["", "\n", "[]\n", '{"epoch"'])
def test_a_run_without_a_line_of_figures_spares_the_others(sweep, content):
    path = sweep / "lr=1" / "log.txt"
    path.write_text(content)
    found, messages = read(sweep)
    assert [record.name for record in found.runs] == ["lr=0", "lr=2"] and found.missing == ["lr=1"]
    assert any(f"{path} " in message and "not finished an epoch" in message for message in messages)
    path.unlink()
    os.mkfifo(path)
    assert [record.name for record in read(sweep)[0].runs] == ["lr=0", "lr=2"], "a pipe is no log"


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_flags_are_those_of_the_plan(sweep, content):
    path = sweep / "lr=1" / "flags.json"
    path.write_text(content)
    found, (message,) = read(sweep)
    assert [record.flags for record in found.runs] == [{"lr": i} for i in range(3)]
    assert message.startswith(f"{path} ")


@pytest.mark.parametrize("content", [*DAMAGED, '{"flags": 5}'])
def test_damaged_records_of_runs_are_named(sweep, content):
    for i in range(3):
        (sweep / f"lr={i}" / "flags.json").unlink()
        (sweep / f"lr={i}" / "run.json").write_text(json.dumps({"flags": {"lr": i}}))
    (sweep / "lr=1" / "run.json").write_text(content)
    found, (message,) = read(sweep)
    assert [record.flags for record in found.runs] == [{"lr": i} for i in range(3)]
    assert message.startswith(f"{sweep / 'lr=1' / 'run.json'} ")


@pytest.mark.parametrize(
    "content",
    [*DAMAGED, "{}", '{"points": [5]}', '{"points": [], "sweep": []}', '{"points": [{"name": "a"}]}']
    + ['{"points": [{"name": "a\\u001b", "flags": {}}]}', '{"points": [{"name": "/etc", "flags": {}}]}'],
)
def test_without_a_whole_plan_flags_that_differ_are_swept(sweep, content):
    (sweep / "sweep.json").write_text(content)
    found, (message,) = read(sweep)
    assert len(found.runs) == 3 and found.swept == ["lr"] and found.missing == []
    assert message.startswith(f"{sweep / 'sweep.json'} ")


def test_a_page_names_damaged_files_and_shows_the_other_runs(sweep, capsys):
    (sweep / "lr=0" / "log.txt").write_text("[]\n")
    (sweep / "lr=1" / "flags.json").write_text("{")
    (sweep / "lr=2" / "run.json").write_text("5")
    (sweep / "lr=2" / "pictures").mkdir()
    os.mkfifo(sweep / "lr=2" / "pictures" / "epoch-9.png")
    Image.new("RGB", (8, 8)).save(sweep / "lr=2" / "pictures" / "epoch-1.png")
    text = page(str(sweep))
    warnings = capsys.readouterr().err
    damage = text[text.index("Files that could not be read") :]
    for name in ("lr=0/log.txt", "lr=1/flags.json", "lr=2/run.json"):
        assert damage.count(f"<li>{sweep / name}") >= 1 and f"warning: {sweep / name} " in warnings
    assert "<td>lr=1</td>" in text and "<td>lr=2</td>" in text and "<td>lr=0</td>" not in text
    assert "epoch-1.png" in text and "epoch-9" not in text
    for name in ("flags.json", "run.json"):
        (sweep / "lr=1" / name).unlink(missing_ok=True)
        (sweep / "lr=2" / name).unlink(missing_ok=True)
    (sweep / "lr=0" / "log.txt").write_text(GOOD)
    assert "Files that could not be read" not in page(str(sweep))


def test_commands_draw_the_runs_that_can_be_read(sweep, tmp_path, capsys):
    (sweep / "lr=1" / "log.txt").write_text('{"epoch": 0, "train_position": "NaN"}\n')
    (sweep / "sweep.json").write_text("[]")
    for argv in (["sweep", sweep, tmp_path / "s.png"], ["curves", tmp_path / "c.png", sweep]):
        args = visualize.get_args_parser().parse_args([str(word) for word in argv])
        assert run(visualize.main, args) == 0
    warnings = capsys.readouterr().err
    assert f"warning: {sweep}/lr=1/log.txt has damaged lines" in warnings
    assert f"warning: {sweep}/sweep.json holds a JSON list" in warnings


NAMES = [
    "$a$",
    "a$b",
    "_hidden",
    "$\\frac{",
    "\\$x$",
    "a^b_c{",
    "esc\x1b[31m",
    "two\nlines",
    "\u202egnp.exe",
    "x" * 500,
]
PLAIN = [
    "$a$",
    "a$b",
    "_hidden",
    "$\\frac{",
    "\\$x$",
    "a^b_c{",
    "esc\\x1b[31m",
    "two\\nlines",
    "\\u202egnp.exe",
]


def drawn_texts(figure, tmp_path) -> list[str]:
    """The texts of a figure as matplotlib draws them: an SVG whose texts are not paths."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(tmp_path / "f.svg")
    root = ElementTree.parse(tmp_path / "f.svg").getroot()
    # A formula would have parts.
    return ["".join(each.itertext()) for each in root.iter("{http://www.w3.org/2000/svg}text")]


def record(name: str, **flags) -> runs.RunRecord:
    return runs.RunRecord(name, name, flags, [{"epoch": 0, "train_position": 1.0, "train_$m$": 2.0}], name)


def test_any_name_is_drawn_as_it_is(tmp_path):
    texts = drawn_texts(charts.curves([record(name) for name in NAMES]), tmp_path)
    # In the legend, and as the title of a panel.
    assert all([text.strip() for text in texts].count(name) == 1 for name in [*PLAIN, "$m$"]), texts
    assert any(text.startswith("xxx") and " ... " in text and len(text) < 200 for text in texts)
    references = charts.curves([record("$a$")], [record("_r$")])
    assert "reference: _r$" in drawn_texts(references, tmp_path)


def test_any_flag_is_drawn_as_it_is(tmp_path):
    records = [record(name, **{"$f$": name, "_g": "$b$"}) for name in NAMES]
    groups = aggregate(records, "$f$", "train_position")
    texts = [text.strip() for text in drawn_texts(charts.sweep(groups, "$f$", "$m$", None), tmp_path)]
    assert all(texts.count(name) == 1 for name in PLAIN), texts
    assert "$f$" in texts and "$m$ in the last epoch" in texts
    assert "_g $b$, one seed" in texts, "matplotlib leaves labels that start with _ out of a legend"


def test_texts_of_charts_are_short():
    text = chart_text("start" + "x" * 10_000 + "end")
    assert text.startswith("startx") and text.endswith("xend") and len(text) == LONGEST + 5


def test_values_that_are_no_numbers_have_places_of_their_own(tmp_path):
    values = [float("nan"), float("inf"), 10**200, {"a": [1]}, [[1], [2]], None, 0.5, "0.5"]
    groups = aggregate([record(str(i), x=value) for i, value in enumerate(values)], "x", "train_position")
    figure = charts.sweep(groups, "x", "train_position", None)
    charts.save(figure, str(tmp_path / "x.png"))
    assert len(figure.axes[0].get_xticklabels()) == len(values)


def test_a_foreign_log_with_many_figures_is_drawn_in_part(monkeypatch):
    monkeypatch.setattr(charts, "MOST_PANELS", 2)
    many = runs.RunRecord("a", "a", {}, [{"epoch": 0} | {f"train_{i:03}": 1.0 for i in range(200)}], "a")
    figure = charts.curves([many])
    assert len(figure.axes) == 2
    assert "the first 2 of 200 figures" in figure.legends[0].get_title().get_text()


@pytest.mark.parametrize("name", ["<b>&\"'", "$x$", "esc\x1b[31m", "two\nlines", "\u202egnp.exe", "x" * 200])
def test_names_on_a_page_are_escaped_everywhere(tmp_path, name):
    folder = tmp_path / f"s{name[:20]}" / name
    (folder / "pictures").mkdir(parents=True)
    (folder / "log.txt").write_text(json.dumps({"epoch": 0, f"train_{name}": 1.0, "train_loss": 1.0}))
    (folder / "flags.json").write_text(json.dumps({name: name}))
    Image.new("RGB", (8, 8)).save(folder / "pictures" / f"{name[:20]}.png")
    text = page(str(folder.parent))
    assert all(character == "\n" or character.isprintable() for character in text)
    # Without the tags of the page and the texts between them, nothing is left.
    tags = set(re.findall(r"<[^>]*>", re.sub(r'(src|alt)="[^"]*"', "", text)))
    assert not any("<b>" in tag and name in tag for tag in tags)
    shown = html.escape(name.replace("\x1b", "\\x1b").replace("\n", "\\n").replace("\u202e", "\\u202e"))
    assert text.count(f"<td>{shown}</td>") >= 1 and f'<figure><img alt="{shown}: ' in text
    for uri in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", text):
        ElementTree.fromstring(base64.b64decode(uri))


def test_cells_of_tables_stay_cells():
    table = Table(["a|b", "c\nd"], [["e\\|f", "\x1b[31m"], ["g\\", "\u202eh"]])
    assert table.markdown().splitlines() == [
        "| a\\|b | c\\\\nd |",
        "|---|---|",
        "| e\\\\\\|f | \\\\x1b[31m |",
        "| g\\\\ | \\\\u202eh |",
    ]
    assert table.text().splitlines() == ["a|b   c\\nd", "e\\|f  \\x1b[31m", "g\\    \\u202eh"]
    assert "<td>\\x1b[31m</td>" in table.html() and "<th>c\\nd</th>" in table.html()


@pytest.fixture
def results(tmp_path):
    """Results of two experiments."""
    folder = tmp_path / "results"
    folder.mkdir()
    for name in ("mae", "mask_ratio"):
        (folder / f"{name}.json").write_bytes((ROOT / "evidence" / "results" / f"{name}.json").read_bytes())
    return folder


def call(*argv) -> int:
    args = evidence.get_args_parser().parse_args([str(word) for word in argv])
    return run(lambda args: evidence.main(args, []), args)


FOREIGN = [*DAMAGED, "{}", '{"runs": 5}']


@pytest.mark.parametrize("content", FOREIGN)
def test_damaged_results_are_named_and_spare_the_others(results, tmp_path, capsys, content):
    path = results / "mae.json"
    path.write_text(content)
    assert call("list", "--results", results) == 0
    shown = capsys.readouterr()
    assert f"warning: {path} " in shown.err
    assert f"{'mask_ratio':18} {EXPERIMENTS['mask_ratio'].title}: 15 runs" in shown.out
    # The page would lose the table.
    (tmp_path / "page.md").write_text("old")
    assert call("write", "--results", results, "--page", tmp_path / "page.md") == 2
    assert f"error: {path} " in capsys.readouterr().err and (tmp_path / "page.md").read_text() == "old"


def finished_run(folder) -> None:
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text(GOOD)
    (folder / "flags.json").write_text('{"seed": 0}')


@pytest.mark.parametrize("content", FOREIGN)
def test_damaged_results_are_not_overwritten(results, tmp_path, capsys, content):
    (results / "mae.json").write_text(content)
    for name in ("mae", "mae_long"):
        finished_run(tmp_path / "runs" / name / "seed=0")
    assert call("collect", "mae", "mae_long", "--runs", tmp_path / "runs", "--results", results) == 2
    assert f"mae: {results / 'mae.json'} " in capsys.readouterr().err
    assert (results / "mae.json").read_text() == content
    assert len(json.loads((results / "mae_long.json").read_text())["runs"]) == 1, "the others are collected"


def test_runs_with_damaged_notes_are_not_collected(tmp_path, capsys):
    for seed in (0, 1):
        finished_run(tmp_path / f"seed={seed}")
        (tmp_path / f"seed={seed}" / "run.json").write_text('{"devices": 5, "versions": 7}')
    (tmp_path / "seed=1" / "job.json").write_text('{"state": []}')
    result = records.collect(str(tmp_path))
    assert [each["name"] for each in result["runs"]] == ["seed=0"] and result["missing"] == ["seed=1"]
    assert result["machines"] == [] and result["versions"] == {}
    assert f"warning: {tmp_path / 'seed=1' / 'job.json'} is damaged" in capsys.readouterr().err
    (tmp_path / "sweep.json").write_text("[]")
    with pytest.raises(ValueError, match=r"sweep\.json holds a JSON list"):
        records.collect(str(tmp_path))


def test_results_are_written_as_a_whole(tmp_path, monkeypatch):
    finished_run(tmp_path / "seed=0")
    result = records.collect(str(tmp_path))
    path = tmp_path / "out.json"
    records.write_json(str(path), result)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        records.write_json(str(path), result | {"hours": 9.0})
    assert path.read_bytes() == before and not list(tmp_path.glob("*.partial*"))
