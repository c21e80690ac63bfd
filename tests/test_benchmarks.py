"""The benchmarks' own arithmetic and front; nothing is timed here."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import timing

ROOT = Path(__file__).parent.parent


def test_interleaved_rotates_the_order_and_charges_each_its_own():
    now, calls = [0.0], []

    def variant(name, cost):
        def call():
            calls.append(name)
            now[0] += cost
        return call
    found = timing.interleaved({n: variant(n, c) for n, c in (("a", 1.0), ("b", 2.0), ("c", 4.0))}, 3, clock=lambda: now[0])
    assert found == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [4.0] * 3}
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"


def test_freed_memory_is_switched_with_a_call_in_between(monkeypatch):
    calls, switches = [], []
    monkeypatch.setattr(timing, "keep_freed_memory", lambda: switches.append("keep"))
    monkeypatch.setattr(timing, "return_freed_memory", lambda: switches.append("return"))
    monkeypatch.setattr(timing, "trim", lambda: switches.append("trim"))
    variants = {name: lambda name=name: calls.append(name) for name in ("ours", "apl", "peer")}
    unmeasured = {name: lambda name=name: calls.append(f"({name})") for name in variants}
    settle = timing.freed_memory(lambda name: name != "peer", unmeasured)
    timing.interleaved(variants, 1, prepare=settle)
    assert calls == ["(ours)", "ours", "apl", "(peer)", "peer", "(ours)", "ours", "apl", "(peer)", "peer"]
    assert switches == ["keep", "trim", "return", "trim"] * 2


def test_ratio_is_formed_within_rounds():
    found = timing.ratio([2.0, 8.0, 3.0], [1.0, 2.0, 3.0])
    assert found == dict(median=2.0, min=1.0, max=4.0)
    assert timing.shown(found) == "2.00 [1.00..4.00]"


def test_table():
    lines = timing.table([dict(path="a", ms=1.23456), dict(path="longer", ms="x")]).splitlines()
    assert lines == ["| path   | ms    |", "|--------|-------|", "| a      | 1.235 |", "| longer | x     |"]


def run(*argv):
    return subprocess.run([sys.executable, "benchmarks/run.py", *argv], cwd=ROOT, capture_output=True, text=True)


def test_front_lists_and_refuses():
    listed = run("--list")
    assert listed.returncode == 0
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    assert "run" not in names and "timing" not in names
    assert {p.stem for p in (ROOT / "benchmarks").glob("*.py")} - {"run", "timing"} == set(names)
    wrong = run("dta")
    assert wrong.returncode == 2 and "no benchmark 'dta'" in wrong.stderr


def test_front_writes_figures_with_the_machine(tmp_path, monkeypatch):
    (tmp_path / "probe_of_the_front.py").write_text('"""One."""\ndef main(argv):\n    return dict(argv=argv)\n')
    from benchmarks import run as front
    monkeypatch.setattr(front, "HERE", tmp_path)
    monkeypatch.setattr(front.importlib, "import_module", lambda name: __import__("probe_of_the_front"))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert front.main(["probe_of_the_front", "--json", str(tmp_path / "x.json"), "--rounds", "2"]) == 0
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["results"] == {"argv": ["--rounds", "2"]} and record["benchmark"] == "probe_of_the_front"
    assert record["machine"]["cpu"] and record["versions"]["torch"] and record["machine"]["cores"] >= 1
    with pytest.raises(SystemExit):
        front.main(["nothing"])
