"""Model FLOPs utilisation: what is counted, what is left out, and that measuring changes nothing."""

import itertools
import json

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import engine
import main_finetune
import main_linprobe
import main_pretrain
import main_sere
import tiny  # noqa: F401 (registers mae_test, vit_test and sere_test)
from benchmarks.step import training_flops
from layers.contract import Labels
from layers.positional.head import PositionalHead
from layers.transformer import Block, run_blocks
from models_mae_pl import MODELS
from processes import assert_same, last, ranks
from util.flags.parser import parse, run
from util.run import flops
from util.run.flops import FlopCounter, matmul_rate

COMMON = [
    "--input_size",
    "32",
    "--batch_size",
    "40",
    "--epochs",
    "2",
    "--num_workers",
    "0",
    "--device",
    "cpu",
]


def call(main, *flags) -> int:
    return run(main.main, parse(main.get_args_parser(), [*COMMON, *map(str, flags)]))


def lines_of(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def counted(step) -> int:
    with FlopCounter() as counter:
        step()
    return counter.total


def test_a_masked_autoencoder_counts_its_formula():
    """The count is the benchmark's formula without the gradient of the pixels, which nothing needs."""
    model = MODELS["mae_test"](img_size=(32, 32), pos_label="none")
    images = torch.randn(3, 3, 32, 32)
    found = counted(lambda: model(images, want_pred=False)[0]["pixel"].backward())
    visible, pixels = 4, 8 * 8 * 3
    assert found == 3 * (training_flops(model) - 2 * visible * pixels * model.dim)


@pytest.mark.parametrize("amp", [False, True], ids=["fused attention", "plain products"])
@pytest.mark.parametrize(
    "reentrant", [None, False, True], ids=["kept", "recomputed", "recomputed, reentrant"]
)
def test_work_that_backward_repeats_is_no_work_of_the_model(amp, reentrant):
    B, N, C = 2, 5, 16
    blocks, x = nn.ModuleList([Block(C, 2) for _ in range(3)]), torch.randn(B, N, C, requires_grad=True)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            if reentrant:
                y = x
                for block in blocks:
                    y = torch.utils.checkpoint.checkpoint(block, y, use_reentrant=True)
            else:
                y = run_blocks(blocks, x, recompute=reentrant is not None)
        y.sum().backward()

    assert counted(step) == 3 * 6 * B * (12 * N * C**2 + 2 * N**2 * C)


@pytest.mark.parametrize("pairs", [0, 2])
def test_products_inside_the_sweep_over_pairs_are_seen(pairs):
    """Two projections a token and one merged matrix a pair, as in the head; gradients triple them."""
    B, D, grid, offsets = 2, 16, (2, 3), 3 * 5  # the sweep multiplies 16, which is faster
    head, x = (
        PositionalHead(D, grid, Labels("rpl", rpl_pairs=pairs)),
        torch.randn(B, 6, D, requires_grad=True),
    )
    macs = B * 6 * 2 * (D // 2) ** 2  # q and k
    macs += B * 6 * (pairs or 6) * (D // 2) * (offsets + 1)
    macs += offsets * (D // 2) ** 2 + offsets * D // 2  # classifier and second linear merged, weight and bias
    vector = (
        2 * offsets * D // 2
    )  # the bias's part is a matrix-vector product, which is not counted in backward
    assert abs(counted(lambda: head(x)["position"].backward()) - 6 * macs) <= 3 * vector


@pytest.mark.slow  # compiles
def test_compiled_code_counts_the_same():
    torch.manual_seed(0)
    model = MODELS["mae_test"](img_size=(32, 32), pos_label="apl+rpl")
    images = torch.randn(2, 3, 32, 32)

    def gradients(call):
        torch.manual_seed(1)
        model.zero_grad()
        losses = call(images, want_pred=False)[0]
        (losses["pixel"] + losses["position"]).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    compiled = torch.compile(model, backend="aot_eager")
    with FlopCounter() as counter:
        first = gradients(compiled)
    assert counter.total == counted(lambda: gradients(model)) > 0
    assert all(map(torch.equal, first, gradients(compiled))), "what ran within the counter was compiled, too"
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0


def linear(tokens: int, *widths: int) -> int:
    """Operations of a chain of linears, forward only."""
    return sum(2 * tokens * a * b for a, b in itertools.pairwise(widths))


def expected(name: str) -> float:
    """Operations of training on one image: 16 patches of 192 values, width 32, two blocks."""
    if name == "pretrain":
        return training_flops(MODELS["mae_test"](img_size=(32, 32))) - linear(4, 192, 32)
    embed, blocks = linear(16, 192, 32), 2 * 2 * (12 * 17 * 32**2 + 2 * 17**2 * 32)
    if name == "finetune":
        return 2 * embed + 3 * (blocks + linear(1, 32, 10))
    return (
        embed + blocks + 5 * 2 * linear(1, 32, 10)
    )  # the encoder is frozen, five heads want no gradient of its features


@pytest.mark.slow  # trains
@pytest.mark.parametrize("name", ["pretrain", "finetune", "linprobe"])
def test_mfu_is_operations_by_time_and_rate(name, tmp_path, monkeypatch, capsys):
    """From the images/s of the same line; accumulated micro-batches are counted once each."""
    main, flags = main_pretrain, ["--model", "mae_test", "--pos_label", "none"]
    if name == "finetune":
        main, flags = main_finetune, ["--model", "vit_test", "--accum_iter", 2]
    if name == "linprobe":
        torch.save({"model": MODELS["mae_test"](img_size=(32, 32)).state_dict()}, tmp_path / "p.pth")
        main, flags = main_linprobe, ["--model", "vit_test", "--finetune", tmp_path / "p.pth"]
    monkeypatch.setattr(flops, "matmul_rate", lambda device, dtype: 1e9)
    assert call(main, *flags, "--output_dir", tmp_path / "run") == 0
    lines = lines_of(tmp_path / "run")
    assert len(lines) == 2
    for line in lines:
        assert line["mfu"] == pytest.approx(100 * line["img_per_s"] * expected(name) / 1e9, rel=1e-6)
    assert " (mfu " in capsys.readouterr().out
    assert call(main, *flags, "--output_dir", tmp_path / "run", "--epochs", 3) == 0, (
        "continued: its first update counts"
    )
    line = lines_of(tmp_path / "run")[2]
    assert line["mfu"] == pytest.approx(100 * line["img_per_s"] * expected(name) / 1e9, rel=1e-6)


SERE = ["--model", "sere_test", "--local_size", 16, "--local_crops_number", 2, "--out_dim", 32, "--epochs", 1]
RUNS = {
    "pretrain": (main_pretrain, ["--model", "mae_test", "--pos_label", "apl+rpl", "--rpl_pairs", 3]),
    "finetune": (main_finetune, ["--model", "vit_test", "--pos_label", "rpl", "--grad_checkpointing"]),
    "sere": (main_sere, SERE),
}


@pytest.mark.slow  # trains
@pytest.mark.parametrize("name", RUNS)
def test_measuring_changes_no_bit(name, tmp_path, monkeypatch):
    main, flags = RUNS[name]
    assert call(main, *flags, "--output_dir", tmp_path / "with") == 0
    assert all(line["mfu"] > 0 for line in lines_of(tmp_path / "with"))

    monkeypatch.setattr(engine, "peak_flops", lambda *_: None)
    assert call(main, *flags, "--output_dir", tmp_path / "without") == 0
    assert "mfu" not in lines_of(tmp_path / "without")[0]
    assert_same(last(tmp_path / "with"), last(tmp_path / "without"))


def test_the_rate_draws_from_no_shared_generator():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    assert matmul_rate(torch.device("cpu"), torch.float32) > 1e8
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rate_is_that_of_the_product_that_models_use(dtype):
    """x @ weight.T. In bfloat16 x @ weight is five times slower on some CPUs."""
    seen = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default:
                seen.append([a.stride() for a in args])
            return func(*args, **(kwargs or {}))

    with Spy():
        assert matmul_rate(torch.device("cpu"), dtype) > 1e8
    assert seen and all(x[1] == 1 and weight[0] == 1 for x, weight in seen), (
        "rows of x, columns of weight.T are contiguous"
    )


@pytest.mark.slow  # trains
def test_compiled_and_recomputed_says_nothing(tmp_path, monkeypatch):
    """There the second run of a block cannot be told from the first."""
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    flags = ["--model", "mae_test", "--compile", "--output_dir", tmp_path / "a"]
    assert call(main_pretrain, *flags) == 0 and "mfu" in lines_of(tmp_path / "a")[0]
    assert call(main_pretrain, *flags, "--output_dir", tmp_path / "b", "--grad_checkpointing") == 0
    assert "mfu" not in lines_of(tmp_path / "b")[0]


@pytest.mark.slow  # starts two processes
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_count_their_own_part(strategy, tmp_path):
    """Images/s and the rate are those of all ranks. Sharded parameters count like others."""
    results = ranks(
        2, tmp_path, "--epochs", 1, "--batch_size", 20, "--pos_label", "none", "--strategy", strategy
    )
    assert all(code == 0 for code, _ in results), results[0][1]
    line, start = (json.loads((tmp_path / name).read_text()) for name in ("log.txt", "run.json"))
    rate = 1e9 * start["resolved"]["matmul_gflops"]
    assert line["mfu"] == pytest.approx(100 * line["img_per_s"] * expected("pretrain") / (2 * rate), rel=1e-6)
