"""Launches of one training step: whether the device or the host that gives it work takes longer.

    python benchmarks/run.py launches                                              on a GPU, bf16
    python benchmarks/run.py launches --models mae_vit_base_patch16 --variants mae compiled graphs
    python benchmarks/run.py launches --variants mae compiled --variants mae       a list for each of the models

A step is that of `step`. The host issues it to an idle device. Two times are taken: when the host has issued it, and when the
device has done it. A step whose kernels take less time than the host takes to issue them is bound by the host. Launches and
kernels are counted by torch's profiler. It stays attached to the device afterwards and may slow launches down. So all
variants are timed first.

On a CPU, which has no launches, operators that run a kernel are counted instead, views and allocations left out; those
of compiled code are not seen.
"""

import argparse
import time

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_table import launches_section
from benchmarks.step import COMPILE_MODES, LABELS, MAE, built, does_not_compile
from benchmarks.timing import Record, choose_device, spread, wait_for
from models_mae_pl import MODELS

WARMUP = 5  # steps: CUDA graphs are recorded in the second one
LAUNCHES = {
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cudaLaunchCooperativeKernel",
    "cudaGraphLaunch",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
}
NO_KERNEL = {
    f"aten::{name}"
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")
}
USUAL_PIXELS = {8: 64, 4: 32}  # by patch size; larger patches are for 224


def runs_a_kernel(func) -> bool:
    """Whether that operator does; the optimizer's marks for the profiler do not either."""
    if not isinstance(func, torch._ops.OpOverload) or func.namespace == "profiler":
        return False
    return not func.is_view and func._schema.name not in NO_KERNEL


class OperatorCounter(TorchDispatchMode):
    """Counts in `total` the operators below autograd that run a kernel."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if runs_a_kernel(func):
            self.total += 1
        return func(*args, **(kwargs or {}))


def bare_launch_us(device: torch.device, calls: int = 1000, rounds: int = 5) -> dict[str, float]:
    """Microseconds that the host takes for an operator whose kernel has next to nothing to do."""
    x, found = torch.zeros(1, device=device), []
    for _ in range(1 + rounds):
        wait_for(device)
        begin = time.perf_counter()
        for _ in range(calls):
            x.add_(1)
        found.append(1e6 * (time.perf_counter() - begin) / calls)
    wait_for(device)
    return spread(found[1:])  # the first round loads the kernel


def timed(step, repeats: int) -> dict:
    """Milliseconds until a step is issued, and until it is done. The device is idle each time before.

    More steps at once would fill the queue of launches. Then the host waits for the device.
    """
    for _ in range(WARMUP):
        step.run(wait=True)
    issued, done = [], []
    for _ in range(repeats):
        begin = step.now(wait=True)
        step.run()
        issued.append(1e3 * (time.perf_counter() - begin))
        done.append(1e3 * (step.now(wait=True) - begin))
    return dict(host_ms=spread(issued), step_ms=spread(done))


def counted(step, compiled: bool) -> dict:
    """Launches of one step and, on a GPU, what they run there."""
    if step.images.is_cuda:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            step.run(wait=True)
        return tally(profiler.events())
    if compiled:
        return {}
    with OperatorCounter() as counter:
        step.run()
    return dict(launches=counter.total)


def tally(events) -> dict:
    """Launches, kernels and copies on the device, the milliseconds of these, and the eight kinds that take longest."""
    # Named ranges appear on the device too. They last as long as the kernels within them.
    on_device = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    kinds: dict[str, dict] = {}
    for event in on_device:
        kind = kinds.setdefault(event.name, dict(name=event.name.removeprefix("void ")[:60], ms=0.0, times=0))
        kind["ms"] += event.time_range.elapsed_us() / 1e3
        kind["times"] += 1
    longest = sorted(kinds.values(), key=lambda kind: -kind["ms"])
    return dict(
        launches=sum(e.name in LAUNCHES for e in events),
        kernels=len(on_device),
        busy_ms=sum(kind["ms"] for kind in longest),
        longest=longest[:8],
    )


def built_and_timed(name, variant, amp, images, repeats):
    """(what was measured or why not, the step or None). What fails costs the other variants nothing."""
    try:
        step = built(name, [(variant, amp)], images, 1)[variant, amp]
        return timed(step, repeats), step
    except torch.OutOfMemoryError:
        return dict(error="out of memory"), None
    except torch._dynamo.exc.TorchDynamoException as e:
        return does_not_compile(e), None


def pixels(name: str, asked: int | None) -> tuple[int, int]:
    """The size of the images that a model is measured with."""
    with torch.device("meta"):
        model = MODELS[name](**MAE)
    side = asked or USUAL_PIXELS.get(model.patch_size[0], model.img_size[0])
    return side, side


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run.py launches", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--models",
        nargs="+",
        default=["mae_vit_small_patch16", "mae_vit_tiny_patch8"],
        choices=MODELS,
        metavar="MODEL",
        help="names in models_mae_pl.MODELS (default: %(default)s)",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        action="append",
        choices=LABELS,
        metavar="NAME",
        help=f"some of {', '.join(LABELS)}; once for all models or once for each (default: mae)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", choices=["fp32", "bf16", "fp16"], help="bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--batch_size", type=int, help="16 on a CPU, 256 on a GPU")
    parser.add_argument("--img_size", type=int, help="64 for patches of 8 pixels, 32 for 4, else 224")
    parser.add_argument("--repeats", type=int, default=20, help="steps that are timed")
    return parser


def main(argv, record: Record | None = None) -> dict:
    parser = get_parser()
    args, record = parser.parse_args(argv), record or Record()
    lists = args.variants or [["mae"]]
    if len(lists) not in (1, len(args.models)):
        parser.error(
            f"--variants is given {len(lists)} times for {len(args.models)} models: give it once, or once for each"
        )
    if len(lists) == 1:
        lists = lists * len(args.models)
    device = choose_device(args.device)
    cuda = device.type == "cuda"
    amp = args.amp or ("bf16" if cuda else "fp32")
    batch = args.batch_size or (256 if cuda else 16)
    torch.manual_seed(0)
    record.set("launch_us", bare_launch_us(device))
    wanted = [(name, variant) for name, variants in zip(args.models, lists) for variant in variants]
    wanted.sort(key=lambda pair: pair[1] in COMPILE_MODES)  # compiling takes longest
    steps = []
    # Without the patch the sizes of a second model would be compiled as variables, as all models share their code.
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        for name, variant in wanted:
            images = torch.randn(batch, 3, *pixels(name, args.img_size), device=device)
            found, step = built_and_timed(name, variant, amp, images, args.repeats)
            row = dict(
                model=name,
                variant=LABELS[variant],
                amp=amp,
                batch_size=batch,
                pixels=images.shape[-1],
                **found,
            )
            record.add("rows", row)
            print(f"{name}, {LABELS[variant]}: timed", flush=True)
            if step is not None:
                steps.append((row, step, variant in COMPILE_MODES))
        for row, step, compiled in steps:
            row |= counted(step, compiled)
            if "launches" in row:
                row["us_per_launch"] = 1e3 * row["host_ms"]["median"] / row["launches"]
            record.write()
    print("\n".join(launches_section([record.results])))
    return record.results
