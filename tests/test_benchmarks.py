"""The benchmarks' own arithmetic and front; nothing is timed here."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny  # noqa: F401 (registers mae_test)
from benchmarks import gpu_table, rpl, step, timing
from benchmarks import run as front

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
    assert {p.stem for p in (ROOT / "benchmarks").glob("*.py")} - {"run", "timing", "gpu_table"} == set(names)
    wrong = run("dta")
    assert wrong.returncode == 2 and "no benchmark 'dta'" in wrong.stderr


@pytest.fixture
def own_benchmark(tmp_path, monkeypatch):
    """`benchmarks/run.py own` with the given body of its main, by name of the file that `--json` is to write."""
    def call(body, *argv):
        (tmp_path / "own.py").write_text(f'"""One."""\ndef main(argv, record=None):\n{body}\n')
        scope = {}
        exec((tmp_path / "own.py").read_text(), scope)
        monkeypatch.setattr(front, "HERE", tmp_path)
        monkeypatch.setattr(front.importlib, "import_module", lambda name: type("own", (), {"main": scope["main"]}))
        return front.main(["own", "--json", str(tmp_path / "x.json"), *argv])
    return call


def test_front_writes_figures_with_the_machine(tmp_path, own_benchmark):
    assert own_benchmark("    record.set('argv', argv)", "--rounds", "2") == 0
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["results"] == {"argv": ["--rounds", "2"]} and record["benchmark"] == "own"
    assert record["machine"]["cpu"] and record["versions"]["torch"] and record["machine"]["cores"] >= 1
    with pytest.raises(SystemExit):
        front.main(["nothing"])


def test_a_benchmark_that_ends_early_leaves_its_rows(tmp_path, own_benchmark):
    with pytest.raises(KeyboardInterrupt):
        own_benchmark("    record.add('rows', dict(ms=1.5))\n    raise KeyboardInterrupt")
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["results"] == {"rows": [{"ms": 1.5}]} and record["versions"]
    assert [p.name for p in tmp_path.glob("x.json*")] == ["x.json"], "no partial file is left"


STEP = ["--device", "cpu", "--models", "mae_test", "--batch_size", "2", "--amp", "fp32", "--rounds", "1"]


def fail_at(monkeypatch, variant, error):
    """The variant's model cannot be built."""
    build = step.build

    def broken(name, *args):
        if name == variant:
            raise error
        return build(name, *args)
    monkeypatch.setattr(step, "build", broken)


def test_rows_of_step_are_there_before_the_next_variant_is_built(tmp_path, monkeypatch):
    fail_at(monkeypatch, "apl", KeyboardInterrupt())
    record = timing.Record(str(tmp_path / "x.json"))
    with pytest.raises(KeyboardInterrupt):
        step.main([*STEP, "--one_by_one", "--variants", "mae", "apl"], record)
    rows = json.loads((tmp_path / "x.json").read_text())["results"]["rows"]
    assert [row["variant"] for row in rows] == [step.OURS] and rows[0]["images_per_s"]["median"] > 0


def test_a_variant_that_is_too_large_is_a_row(monkeypatch, capsys):
    fail_at(monkeypatch, "apl", torch.OutOfMemoryError("no"))
    rows = step.main([*STEP, "--one_by_one", "--steps", "2", "--variants", "mae", "apl", "timm"])["rows"]
    assert [row.get("error") for row in rows] == [None, "out of memory", None]
    assert rows[1]["variant"] == step.LABELS["apl"] and "out of memory" in capsys.readouterr().out
    quotient = rows[2]["seconds"]["median"] / rows[0]["seconds"]["median"]
    assert rows[0]["times_timm"]["median"] == pytest.approx(quotient) and "times_transformers" not in rows[0]


def test_step_interleaves_on_a_cpu_and_names_all_variants(monkeypatch):
    order = []
    build = step.build
    monkeypatch.setattr(step, "build", lambda *args: order.append(args[0]) or build(*args))
    monkeypatch.setattr(step, "interleaved", lambda steps, rounds, **k: order.append(len(steps)) or timing.interleaved(
        steps, rounds, **k))
    rows = step.main([*STEP, "--variants", "mae", "apl", "--grad_checkpointing"])["rows"]
    assert order == ["mae", "apl", "recomputed", 3] and len(rows) == 3


def test_the_obvious_form_of_rpl_may_be_too_large(monkeypatch):
    def naive(*_):
        raise torch.OutOfMemoryError("no")
    monkeypatch.setitem(rpl.FORMS, "obvious", naive)
    monkeypatch.setattr(rpl, "GRID", (2, 2))
    record = timing.Record()
    found = timing.unless_out_of_memory(lambda: rpl.measure_forms([("obvious", "fp32")], 1, 1, torch.device("cpu")))
    assert found == {"error": "out of memory"} and record.results == {}


def spread(value):
    return dict(median=value, min=value / 2, max=value * 2)


def test_table_of_a_gpu(tmp_path):
    """From records as the benchmarks write them, one of them cut off."""
    head = dict(machine=dict(gpu="GPU X", cpu="CPU Y", cores=3), versions={"torch": "9.9"}, commit="abc")

    def row(variant, rate, **more):
        return dict(model="mae_vit_base_patch16", variant=variant, amp="bf16", batch_size=256, seconds=spread(256 / rate),
                    images_per_s=spread(rate), mfu=spread(0.5), **more)
    rows = [row(step.OURS, 3000.0, peak_allocated_mib=2048.0), row(step.COMPILED, 4500.0, compile_s=20.0),
            row(step.HF, 1500.0), dict(model="mae_vit_base_patch16", variant=step.TIMM, amp="bf16", batch_size=256,
                                       error="out of memory")]
    files = {"base": ("step", dict(matmul_peak={"bf16": 7e14}, rows=rows)),
             "cut": ("step", dict(matmul_peak={"bf16": 7e14})),
             "rpl": ("rpl", dict(forms=[dict(form="obvious", amp="bf16", batch_size=16, error="out of memory")])),
             "data": ("data", dict(device=[dict(path="native", images_per_s=spread(9000.0))]))}
    for name, (benchmark, results) in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(head | dict(benchmark=benchmark, results=results)))
    (tmp_path / "log.txt").write_text("== e2e: begins at 3 s\nnoise\n  speed   4321 images/s\n== e2e: rc 0 after 9 s\n")
    gpu_table.write_page(str(tmp_path), [str(tmp_path / "missing.json")])
    text = (tmp_path / "table.md").read_text()
    assert text.startswith("# GPU X\n") and "Commit abc" in text and "bf16 700 TFLOP/s" in text
    cells = {line.split(" | ")[1].strip(): [c.strip() for c in line.split("|")] for line in text.splitlines()
             if line.startswith("| mae_vit_base")}
    columns = [c.strip() for c in next(line for line in text.splitlines() if line.startswith("| model")).split("|")]
    ours, compiled, timm = (dict(zip(columns, cells[name])) for name in (step.OURS, step.COMPILED, step.TIMM))
    assert (ours["images/s"], ours["x transformers"], ours["x timm"], ours["peak GiB"]) == ("3000", "2.00", "", "2.00")
    assert (compiled["x transformers"], compiled["compile s"], compiled["MFU"]) == ("3.00", "20.0", "0.50")
    assert timm["images/s"] == "out of memory" and timm["x transformers"] == ""
    assert "9000 [4500..18000]" in text and "  speed   4321 images/s" in text and "noise" not in text
    assert (gpu_table.HF, gpu_table.TIMM) == (step.HF, step.TIMM)
