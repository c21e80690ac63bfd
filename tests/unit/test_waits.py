"""What wastes time or memory of a GPU and can be tested on a CPU: copies of constants, streams, new lists."""

import contextlib

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

import main_linprobe
from layers.self_distillation import MomentumUpdate, copy_parameters
from util.data.loading import loader
from util.data.pixels import Pixels
from util.evaluate.passes import mean_terms
from util.flags.groups import compile_mode
from util.run import flops, log
from util.train.optim import WeightAverage, clip_each
from util.train.setup import Setup

SETUP = Setup(torch.device("cpu"), "fp32", (8, 8), Pixels((0.5,), (0.5,)))


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.count = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        self.count[name] = self.count.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))


def moved(model: nn.Module, step: int) -> None:
    """Other weights and batch statistics, as a training step makes them."""
    torch.manual_seed(step)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p))
    model(torch.randn(8, 4))


def test_the_average_has_the_bits_and_the_keys_of_torchs():
    live = small_model()
    ours = WeightAverage(live, 0.9)
    torchs = AveragedModel(live, multi_avg_fn=_floats_only(get_ema_multi_avg_fn(0.9)), use_buffers=True)
    for step in range(4):
        moved(live, step)
        ours.update_parameters(live)
        torchs.update_parameters(live)
    expected = torchs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
    assert ours.module[1].num_batches_tracked == 4


def _floats_only(lerp):
    def update(averages, current, count):
        if averages[0].is_floating_point():
            lerp(averages, current, count)
        else:
            for a, c in zip(averages, current):
                a.copy_(c)

    return update


def test_the_average_does_not_copy_its_counter():
    """torch's copies it to the device in every update, which waits. Here only integer buffers are copied."""
    live = small_model()
    ema = WeightAverage(live, 0.9)
    ema.update_parameters(live)
    with Operators() as seen:
        ema.update_parameters(live)
    assert seen.count.get("_to_copy", 0) == 0
    assert seen.count["copy_"] == 1  # num_batches_tracked
    assert seen.count["_foreach_lerp_"] == 1


def test_a_teacher_moves_in_one_call_and_pairs_parameters_once(monkeypatch):
    student, teacher = small_model(), small_model()
    copy_parameters(teacher, student)
    update = MomentumUpdate(teacher, student)
    moved(student, 1)
    before = [p.detach().clone() for p in teacher.parameters()]
    monkeypatch.setattr(nn.Module, "named_parameters", lambda *_: pytest.fail("the lists were made again"))
    with Operators() as seen:
        update(0.75)
    assert seen.count["_foreach_lerp_"] == 1 and sum(seen.count.values()) <= 2, seen.count
    for now, old, new in zip(update.averages, before, update.sources):
        assert torch.equal(now, old.lerp(new, 0.25))


def test_clipping_each_parameter_takes_few_operators_beside_the_scaling():
    """Of n gradients: n products, which differ in their factor; all norms and factors together."""
    params = [nn.Parameter(torch.zeros(i + 1)) for i in range(20)]
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, float(i))
    expected = [
        p.grad * (2.0 / (norm + 1e-6)).clamp(max=1.0)
        for p, norm in zip(params, torch._foreach_norm([p.grad for p in params]))
    ]
    with Operators() as seen:
        clip_each(params, 2.0)
    assert sum(n for name, n in seen.count.items() if name not in ("unbind", "_foreach_mul_")) <= 6, (
        seen.count
    )
    assert all(torch.equal(p.grad, e) for p, e in zip(params, expected))


def test_evaluation_makes_no_tensor_of_a_number_per_batch(monkeypatch):
    """`torch.tensor(n, device=cuda)` is a copy from the host, which waits."""
    made, plain = [], torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *args, **kwargs: made.append(args) or plain(*args, **kwargs))
    batches = [dict(image=torch.full((n, 3), float(n)), index=torch.arange(n), bad=[]) for n in (4, 4, 2)]
    stats = mean_terms(nn.Identity(), lambda model, b: (b["image"].mean(), {}), batches, SETUP)
    assert made == []
    assert stats == {"loss": pytest.approx((4 * 4 + 4 * 4 + 2 * 2) / 10), "images": 10}


def test_batches_that_cannot_be_read_as_a_whole_or_in_part_are_left_out():
    def batch(values, first, bad):
        return dict(
            image=torch.tensor(values)[:, None], index=torch.arange(first, first + len(values)), bad=bad
        )

    batches = [batch([1.0, 100.0, 3.0], 0, [1]), batch([100.0, 100.0], 3, [3, 4]), batch([8.0], 5, [])]
    stats = mean_terms(nn.Identity(), lambda model, b: (b["image"].mean(), {}), batches, SETUP)
    assert stats == {"loss": pytest.approx(4.0), "images": 3}


def test_one_copy_stream_serves_all_passes(monkeypatch):
    """Freed memory stays with the stream that took it, so a new stream per pass would cost a batch."""
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or object())
    loader._copy_stream.cache_clear()
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    try:
        assert loader._copy_stream(first) is loader._copy_stream(first)
        assert loader._copy_stream(first) is not loader._copy_stream(second)
        assert made == [first, second]
    finally:
        loader._copy_stream.cache_clear()


def test_batches_are_made_within_the_copy_stream(monkeypatch):
    """A loader may make batches on the device. In another stream than the copies' they would not be ready."""
    entered, seen = [], []

    @contextlib.contextmanager
    def stream(which):
        entered.append(which)
        yield
        entered.pop()

    def batches():
        seen.append(list(entered))
        yield from ()

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(loader, "_copy_stream", lambda device: "copies")
    assert list(loader.device_batches(batches(), torch.device("cuda"), Pixels((0.5,), (0.5,)))) == []
    assert seen == [["copies"]] and entered == []


@pytest.mark.parametrize(
    "flags, expected",
    [
        (dict(), None),
        (dict(requested=True), "default"),
        (dict(mode="reduce-overhead"), "reduce-overhead"),
        (
            dict(requested=True, mode="max-autotune-no-cudagraphs", accum_iter=4),
            "max-autotune-no-cudagraphs",
        ),
    ],
)
def test_the_mode_in_which_a_model_is_compiled(flags, expected):
    values = dict(requested=False, mode="default", accum_iter=1) | flags
    assert compile_mode(**values) == expected


def test_graphs_do_not_go_with_accumulation():
    with pytest.raises(ValueError, match="--accum_iter 2"):
        compile_mode(True, "reduce-overhead", accum_iter=2)


@pytest.mark.parametrize(
    "mode, counted",
    [(None, True), ("default", True), ("max-autotune-no-cudagraphs", False), ("reduce-overhead", False)],
)
def test_utilisation_is_left_out_where_products_cannot_be_counted(mode, counted, monkeypatch):
    monkeypatch.setattr(flops, "matmul_rate", lambda device, dtype: 1e9)
    assert flops.peak_flops(small_model(), torch.device("cpu"), torch.float32, mode) == (
        1e9 if counted else None
    )


@pytest.mark.parametrize("reserved, shown", [(512.4, "(reserved 512)"), (0.0, "")])
def test_a_log_point_shows_what_the_allocator_holds(reserved, shown, monkeypatch, capsys):
    """Reserved memory also shows a leak in the allocator, which tensors do not. It needs CUDA."""
    monkeypatch.setattr(log, "reserved_memory_mb", lambda: reserved)
    run = log.Log(None)
    run.start_epoch(0, 1, 0, 1, 8)
    run.step(0, {"loss": torch.tensor(1.0)}, 0.1, 0.0)
    run.flush()
    line = capsys.readouterr().out.rstrip()
    assert line.rpartition("max mem: ")[2].partition(" ")[2] == shown


@pytest.mark.parametrize("flags", [["--compile"], ["--compile_mode", "max-autotune-no-cudagraphs"]])
def test_a_probe_is_not_compiled(flags):
    args = main_linprobe.get_args_parser().parse_args(["--finetune", "F", *flags])
    with pytest.raises(ValueError, match="leave them out"):
        main_linprobe.check_flags(args)
