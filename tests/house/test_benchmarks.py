"""The arithmetic of the benchmarks, and the command that runs them. Nothing is timed here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

import tiny  # noqa: F401 (registers mae_test)
from benchmarks import gpu_table, launches, rpl, step, timing
from benchmarks import run as front

ROOT = Path(__file__).parents[2]


def test_interleaved_rotates_the_order_and_times_each_variant():
    now = [0.0]
    calls = []

    def variant(name, cost):
        def call():
            calls.append(name)
            now[0] += cost

        return call

    found = timing.interleaved(
        {n: variant(n, c) for n, c in (("a", 1.0), ("b", 2.0), ("c", 4.0))}, 3, clock=lambda: now[0]
    )
    assert found == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [4.0] * 3}
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"


def test_freed_memory_is_switched_with_a_call_in_between(monkeypatch):
    calls = []
    switches = []
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
    return subprocess.run(
        [sys.executable, "benchmarks/run.py", *argv], cwd=ROOT, capture_output=True, text=True
    )


def test_front_lists_and_refuses():
    listed = run("--list")
    assert listed.returncode == 0
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    assert "run" not in names and "timing" not in names
    assert {p.stem for p in (ROOT / "benchmarks").glob("*.py")} - {"run", "timing", "gpu_table"} == set(names)
    wrong = run("dta")
    assert wrong.returncode == 2 and "no benchmark 'dta'" in wrong.stderr


@pytest.fixture
def small_benchmark(tmp_path, monkeypatch):
    """A function that runs a benchmark with the given body of `main`, and writes x.json."""

    def call(body, *argv):
        (tmp_path / "own.py").write_text(f'"""One."""\ndef main(argv, record=None):\n{body}\n')
        scope = {}
        exec((tmp_path / "own.py").read_text(), scope)
        monkeypatch.setattr(front, "HERE", tmp_path)
        monkeypatch.setattr(
            front.importlib, "import_module", lambda name: type("own", (), {"main": scope["main"]})
        )
        return front.main(["own", "--json", str(tmp_path / "x.json"), *argv])

    return call


def test_front_writes_figures_with_the_machine(tmp_path, small_benchmark):
    assert small_benchmark("    record.set('argv', argv)", "--rounds", "2") == 0
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["results"] == {"argv": ["--rounds", "2"]} and record["benchmark"] == "own"
    assert record["machine"]["cpu"] and record["versions"]["torch"] and record["machine"]["cores"] >= 1
    with pytest.raises(SystemExit):
        front.main(["nothing"])


def test_a_benchmark_that_ends_early_leaves_its_rows(tmp_path, small_benchmark):
    with pytest.raises(KeyboardInterrupt):
        small_benchmark("    record.add('rows', dict(ms=1.5))\n    raise KeyboardInterrupt")
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["results"] == {"rows": [{"ms": 1.5}]} and record["versions"]
    assert [p.name for p in tmp_path.glob("x.json*")] == ["x.json"], "no partial file is left"


STEP = ["--device", "cpu", "--models", "mae_test", "--batch_size", "2", "--amp", "fp32", "--rounds", "1"]


def fail_at(monkeypatch, variant, error):
    """Make the building of a variant's model fail."""
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
    monkeypatch.setattr(
        step,
        "interleaved",
        lambda steps, rounds, **k: order.append(len(steps)) or timing.interleaved(steps, rounds, **k),
    )
    rows = step.main([*STEP, "--variants", "mae", "apl", "--grad_checkpointing"])["rows"]
    assert order == ["mae", "apl", "recomputed", 3] and len(rows) == 3


def test_the_obvious_form_of_rpl_may_be_too_large(monkeypatch):
    def naive(*_):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setitem(rpl.FORMS, "obvious", naive)
    monkeypatch.setattr(rpl, "GRID", (2, 2))
    record = timing.Record()
    found = timing.unless_out_of_memory(
        lambda: rpl.measure_forms([("obvious", "fp32")], 1, 1, torch.device("cpu"))
    )
    assert found == {"error": "out of memory"} and record.results == {}


def test_operators_are_counted_without_views_and_allocations():
    x = torch.ones(2, 3)
    weight = torch.ones(4, 3)
    with launches.OperatorCounter() as counter:
        (x @ weight.t()).relu_().view(8)[2:]
        torch.empty(5)
    assert counter.total == 2, "a product and relu_"


def test_launches_of_a_model_whose_operators_are_known(monkeypatch):
    """A small model is compared with a count by hand. The real model of the same name has more launches."""
    argv = [
        "--device",
        "cpu",
        "--models",
        "mae_test",
        "--img_size",
        "16",
        "--batch_size",
        "2",
        "--repeats",
        "2",
    ]
    (real,) = launches.main(argv)["rows"]

    def build(variant, name, images):
        assert images.shape == (2, 3, 16, 16)
        model = nn.Linear(16, 5, bias=False)
        return model, lambda images: model(images).sum()

    monkeypatch.setattr(step, "build", build)
    (row,) = launches.main(argv)["rows"]
    by_hand = {
        "forward": ["mm", "sum"],
        "backward": ["ones_like", "mm"],
        "AdamW": ["_foreach_add_ of its step", "_fused_adamw_"],
    }
    assert row["launches"] == sum(map(len, by_hand.values())) < real["launches"]
    assert row["us_per_launch"] == pytest.approx(1e3 * row["host_ms"]["median"] / row["launches"])
    assert 0 < row["host_ms"]["median"] <= row["step_ms"]["median"]
    assert (row["variant"], row["pixels"]) == (step.OURS, 16)


def test_launches_times_all_variants_before_it_counts_and_compiled_ones_last(monkeypatch):
    """A variant that fails does not stop the others."""
    order = []

    def timed(name, variant, amp, images, repeats):
        order.append((name, variant, images.shape[-1]))
        if variant == "apl":
            return dict(error="out of memory"), None
        return dict(host_ms=spread(3.0), step_ms=spread(4.0)), f"step of {variant}"

    monkeypatch.setattr(launches, "built_and_timed", timed)
    monkeypatch.setattr(launches, "counted", lambda step, compiled: order.append(step) or dict(launches=2))
    names = ["mae_vit_tiny_patch8", "mae_vit_small_patch16"]
    argv = ["--device", "cpu", "--models", *names, "--variants", "graphs", "apl", "--variants", "mae"]
    rows = launches.main(argv)["rows"]
    assert order == [
        (names[0], "apl", 64),
        (names[1], "mae", 224),
        (names[0], "graphs", 64),
        "step of mae",
        "step of graphs",
    ]
    assert [row.get("us_per_launch") for row in rows] == [None, 1500.0, 1500.0] and rows[0][
        "error"
    ] == "out of memory"
    with pytest.raises(SystemExit):
        launches.main([*argv, "--variants", "mae"])


def test_launches_and_kernels_among_events():
    """Events as in torch's profiler: calls on the host, and the kernels and copies on the device."""

    def event(name, device, us=0.0, named_range=False):
        return SimpleNamespace(
            name=name,
            device_type=device,
            is_user_annotation=named_range,
            time_range=SimpleNamespace(elapsed_us=lambda: us),
        )

    calls = [
        "aten::add_",
        "cudaLaunchKernel",
        "cudaLaunchKernel",
        "cuLaunchKernel",
        "cudaGraphLaunch",
        "cudaMemcpyAsync",
    ]
    kernels = {"void gemm<" + "f" * 99: [700.0, 900.0], "Memcpy DtoD": [50.0]} | {
        f"small {i}": [1.0] for i in range(9)
    }
    events = [event(name, DeviceType.CPU) for name in calls]
    events.append(event("step", DeviceType.CUDA, 2000.0, named_range=True))
    events += [event(name, DeviceType.CUDA, us) for name, all_us in kernels.items() for us in all_us]
    found = launches.tally(events)
    assert (found["launches"], found["kernels"]) == (4, 12) and found["busy_ms"] == pytest.approx(1.659)
    assert len(found["longest"]) == 8 and found["longest"][1]["name"] == "Memcpy DtoD"
    assert found["longest"][0] == dict(name="gemm<" + "f" * 55, ms=pytest.approx(1.6), times=2)


def spread(value):
    return dict(median=value, min=value / 2, max=value * 2)


STEP_ROW = dict(model="mae_vit_base_patch16", amp="bf16", batch_size=256)
LAUNCHES_ROW = dict(model="mae_vit_small_patch16", amp="bf16", batch_size=256, pixels=224)
LOG = """== e2e: begins at 3 s
noise
plan (nothing is written):
  memory       14243 MB at most on the GPU, and workers
  speed        4321.5 images/s, 0.070 s per update, 2 % of it waiting for data
  utilisation  28 % of the 7.618e+05 GFLOP/s of a matrix product
== e2e: rc 0 after 9 s
== e2e_compiled: begins at 12 s
noise
no compiler
== e2e_compiled: rc 1 after 2 s
"""


def step_row(variant, rate, **more):
    """A row of the step benchmark, at so many images per second."""
    times = dict(seconds=spread(256 / rate), images_per_s=spread(rate), mfu=spread(0.5))
    return STEP_ROW | dict(variant=variant) | times | more


def results_of_a_gpu():
    """File name -> (benchmark, results) as the benchmarks write them. One record was cut off."""
    steps = [
        step_row(step.OURS, 3000.0, peak_allocated_mib=2048.0),
        step_row(step.COMPILED, 4500.0, compile_s=20.0),
        step_row(step.HF, 1500.0),
        STEP_ROW | dict(variant=step.TIMM, error="out of memory"),
    ]
    launched = dict(
        variant=step.OURS,
        launches=1200,
        kernels=1300,
        host_ms=spread(30.0),
        step_ms=spread(31.0),
        busy_ms=17.5,
        us_per_launch=25.0,
        longest=[dict(name="gemm", ms=6.5, times=80)],
    )
    failed = dict(variant=step.LABELS["graphs"], error="out of memory")
    launches_rows = [LAUNCHES_ROW | launched, LAUNCHES_ROW | failed]
    return {
        "base": ("step", dict(matmul_peak={"bf16": 7e14}, rows=steps)),
        "cut": ("step", dict(matmul_peak={"bf16": 7e14})),
        "rpl": ("rpl", dict(forms=[dict(form="obvious", amp="bf16", batch_size=16, error="out of memory")])),
        "launches": ("launches", dict(launch_us=spread(4.0), rows=launches_rows)),
        "data": ("data", dict(device=[dict(path="native", images_per_s=spread(9000.0))])),
    }


@pytest.fixture
def gpu_page(tmp_path):
    """The page that gpu_table writes from these records and a log."""
    head = dict(machine=dict(gpu="GPU X", cpu="CPU Y", cores=3), versions={"torch": "9.9"}, commit="abc")
    for name, (benchmark, results) in results_of_a_gpu().items():
        (tmp_path / f"{name}.json").write_text(json.dumps(head | dict(benchmark=benchmark, results=results)))
    # This record has no GPU, and its file comes first by name.
    on_cpu = head | dict(machine=head["machine"] | dict(gpu=None), benchmark="startup", results={})
    (tmp_path / "a.json").write_text(json.dumps(on_cpu))
    (tmp_path / "log.txt").write_text(LOG)
    gpu_table.write_page(str(tmp_path), [str(tmp_path / "missing.json")])
    return (tmp_path / "table.md").read_text()


def cells_of(page, start):
    """The cells of all lines that start so."""
    lines = [line for line in page.splitlines() if line.startswith(start)]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_page_of_a_gpu_names_the_machine(gpu_page):
    assert gpu_page.startswith("# GPU X\n")
    assert "Commit abc" in gpu_page
    assert "bf16 700 TFLOP/s" in gpu_page
    # As in step.py, which gpu_table does not import.
    assert (gpu_table.HF, gpu_table.TIMM) == (step.HF, step.TIMM)


def test_page_of_a_gpu_has_training_steps(gpu_page):
    columns = cells_of(gpu_page, "| model")[0]
    rows = {row[1]: dict(zip(columns, row)) for row in cells_of(gpu_page, "| mae_vit_base")}
    ours = rows[step.OURS]
    assert (ours["images/s"], ours["x transformers"], ours["x timm"]) == ("3000", "2.00", "")
    assert ours["peak GiB"] == "2.00"
    compiled = rows[step.COMPILED]
    assert (compiled["x transformers"], compiled["compile s"], compiled["MFU"]) == ("3.00", "20.0", "0.50")
    timm = rows[step.TIMM]
    assert (timm["images/s"], timm["x transformers"]) == ("out of memory", "")


def test_page_of_a_gpu_has_launches(gpu_page):
    issued = "30.00 [15.00..60.00]"
    step_ms = "31.00 [15.50..62.00]"
    assert [row[2:] for row in cells_of(gpu_page, "| mae_vit_small")] == [
        [step.OURS, "bf16", "256", "1200", "1300", issued, "17.50", step_ms, "25.0"],
        [step.LABELS["graphs"], "bf16", "256", "out of memory", "", "", "", "", ""],
    ]
    assert "4.00 [2.00..8.00] us" in gpu_page
    assert "- 6.50 ms in 80: `gemm`" in gpu_page


def test_page_of_a_gpu_has_data_and_end_to_end_stages(gpu_page):
    assert "9000 [4500..18000]" in gpu_page
    assert "noise" not in gpu_page
    assert cells_of(gpu_page, "| e2e") == [
        ["e2e", "4321.5", "2", "28", "14243"],
        ["e2e_compiled", "no plan: no compiler", "", "", ""],
    ]


def test_a_table_without_records_names_the_machine_of_the_log(tmp_path):
    (tmp_path / "log.txt").write_text(
        "== machine: GPU X, 16 cores\n== e2e: begins at 3 s\nno\n== e2e: rc 1 after 9 s\n"
    )
    gpu_table.write_page(str(tmp_path), [])
    assert (tmp_path / "table.md").read_text().startswith("# GPU X, 16 cores\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_script_for_gpus_says_that_there_is_none(tmp_path):
    environment = os.environ | {"PY": sys.executable, "OUT": str(tmp_path)}
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and "finds no GPU" in done.stderr and "TINY=1" in done.stderr
    assert not any(tmp_path.iterdir())
