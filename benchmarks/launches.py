"""Launches of one training step: whether the device limits its speed, or the host that issues the work.

    python benchmarks/run.py launches                                             on a GPU, bf16
    python benchmarks/run.py launches --models mae_vit_base_patch16 --variants mae compiled graphs
    python benchmarks/run.py launches --variants mae compiled --variants mae      one list for each model

A step is that of `step`. The host issues it to an idle device. Two times are taken: until the host has issued
it, and until the device has finished it. The host limits a step whose kernels take less time than the host
needs to issue them. torch's profiler counts launches and kernels. It stays attached to the device afterwards
and may slow launches down. So all variants are timed first.

A CPU has no launches. There operators that run a kernel are counted instead, without views and allocations.
Operators of compiled code are not visible.
"""

import argparse
import time
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_table import launches_section
from benchmarks.step import COMPILE_MODES, LABELS, MAE, Step, built, does_not_compile
from benchmarks.timing import Record, choose_device, default_device, spread, wait_for
from models_mae_pl import MODELS

# Steps. With CUDA graphs the second one records the graph.
WARMUP = 5
LAUNCHES = {
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cudaLaunchCooperativeKernel",
    "cudaGraphLaunch",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
}
# Operators that only allocate or rearrange memory.
NO_KERNEL = {
    f"aten::{name}"
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")
}
# Image side by patch size. Larger patches are for the model's own size, 224.
USUAL_PIXELS = {8: 64, 4: 32}


def runs_a_kernel(func) -> bool:
    """Whether an operator runs a kernel. Views, allocations and marks for the profiler do not."""
    if not isinstance(func, torch._ops.OpOverload) or func.namespace == "profiler":
        return False
    return not func.is_view and func._schema.name not in NO_KERNEL


class OperatorCounter(TorchDispatchMode):
    """Counts the operators below autograd that run a kernel, in `total`."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if runs_a_kernel(func):
            self.total += 1
        return func(*args, **(kwargs or {}))


def bare_launch_us(device: torch.device, calls: int = 1000, rounds: int = 5) -> dict[str, float]:
    """Microseconds that the host needs for an operator whose kernel has almost no work."""
    x = torch.zeros(1, device=device)
    found = []
    for _ in range(1 + rounds):
        wait_for(device)
        begin = time.perf_counter()
        for _ in range(calls):
            x.add_(1)
        found.append(1e6 * (time.perf_counter() - begin) / calls)
    wait_for(device)
    # The first round loads the kernel.
    return spread(found[1:])


def timed(step: Step, repeats: int) -> dict:
    """Milliseconds until a step is issued, and until it is done."""
    for _ in range(WARMUP):
        step.run(wait=True)
    issued = []
    done = []
    for _ in range(repeats):
        # The device is idle before each step. Several steps at once would fill the queue of launches, and the
        # host would then wait for the device.
        begin = step.now(wait=True)
        step.run()
        issued.append(1e3 * (time.perf_counter() - begin))
        done.append(1e3 * (step.now(wait=True) - begin))
    return dict(host_ms=spread(issued), step_ms=spread(done))


def counted(step: Step, compiled: bool) -> dict:
    """Launches of one step and, on a GPU, the kernels that run. Empty for compiled code on a CPU."""
    if step.images.is_cuda:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            step.run(wait=True)
        return tally(profiler.events())
    if compiled:
        return {}
    # A CPU: operators stand for launches.
    with OperatorCounter() as counter:
        step.run()
    return dict(launches=counter.total)


def tally(events) -> dict:
    """Launches of the host, and kernels and copies on the device, from the events of torch's profiler.

    `busy_ms` is the time of all kernels and copies, `longest` has the eight kinds that take the most of it.
    """
    # Named ranges appear on the device too. They last as long as the kernels within them.
    on_device = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    kinds: dict[str, dict] = {}
    for event in on_device:
        # Names of templates can have thousands of characters.
        short = event.name.removeprefix("void ")[:60]
        kind = kinds.setdefault(event.name, dict(name=short, ms=0.0, times=0))
        kind["ms"] += event.time_range.elapsed_us() / 1e3
        kind["times"] += 1
    longest = sorted(kinds.values(), key=lambda kind: -kind["ms"])
    return dict(
        launches=sum(e.name in LAUNCHES for e in events),
        kernels=len(on_device),
        busy_ms=sum(kind["ms"] for kind in longest),
        longest=longest[:8],
    )


def built_and_timed(
    name: str, variant: str, amp: str, images: torch.Tensor, repeats: int
) -> tuple[dict, Step | None]:
    """Build and time a variant: (figures, step), or (error, None)."""
    # An error does not stop the other variants.
    try:
        step = built(name, [(variant, amp)], images, 1)[variant, amp]
        return timed(step, repeats), step
    except torch.OutOfMemoryError:
        return dict(error="out of memory"), None
    except torch._dynamo.exc.TorchDynamoException as e:
        return does_not_compile(e), None


def pixels(name: str, asked: int | None) -> tuple[int, int]:
    """Size (H, W) of the images that a model is measured with; `asked` is the side, None the usual one."""
    # On the meta device a model costs neither memory nor time.
    with torch.device("meta"):
        model = MODELS[name](**MAE)
    side = asked or USUAL_PIXELS.get(model.patch_size[0], model.img_size[0])
    return side, side


def get_parser() -> argparse.ArgumentParser:
    """Flags of this benchmark."""
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
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--amp", choices=["fp32", "bf16", "fp16"], help="bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--batch_size", type=int, help="16 on a CPU, 256 on a GPU")
    parser.add_argument("--img_size", type=int, help="64 for patches of 8 pixels, 32 for 4, else 224")
    parser.add_argument("--repeats", type=int, default=20, help="steps that are timed")
    return parser


@dataclass(frozen=True)
class Plan:
    """How all variants are measured."""

    amp: str
    batch_size: int
    img_size: int | None
    repeats: int
    device: torch.device


def plan_of(args: argparse.Namespace) -> Plan:
    """The flags, with the device's own values for flags that were not given."""
    device = choose_device(args.device)
    amp = "fp32"
    batch_size = 16
    if device.type == "cuda":
        amp = "bf16"
        batch_size = 256
    return Plan(args.amp or amp, args.batch_size or batch_size, args.img_size, args.repeats, device)


def wanted_pairs(models: list[str], lists: list[list[str]]) -> list[tuple[str, str]]:
    """(model, variant) of all measurements, from one list of variants for all models or one for each."""
    if len(lists) == 1:
        lists = lists * len(models)
    pairs = [(name, variant) for name, variants in zip(models, lists, strict=True) for variant in variants]
    # Compiled variants come last, as compiling takes longest.
    return sorted(pairs, key=lambda pair: pair[1] in COMPILE_MODES)


def time_all(pairs: list[tuple[str, str]], plan: Plan, record: Record) -> list[tuple[dict, Step, bool]]:
    """Time all variants and record their rows. Returns (row, step, whether compiled) of those that ran."""
    steps = []
    for name, variant in pairs:
        size = pixels(name, plan.img_size)
        images = torch.randn(plan.batch_size, 3, *size, device=plan.device)
        found, step = built_and_timed(name, variant, plan.amp, images, plan.repeats)
        row = dict(
            model=name,
            variant=LABELS[variant],
            amp=plan.amp,
            batch_size=plan.batch_size,
            pixels=size[1],
            **found,
        )
        record.add("rows", row)
        print(f"{name}, {LABELS[variant]}: timed", flush=True)
        if step is not None:
            steps.append((row, step, variant in COMPILE_MODES))
    return steps


def main(argv: list[str], record: Record | None = None) -> dict:
    """Time all variants, then count their launches, and print both. Returns the figures."""
    parser = get_parser()
    args = parser.parse_args(argv)
    record = record or Record()
    lists = args.variants or [["mae"]]
    if len(lists) not in (1, len(args.models)):
        parser.error(
            f"--variants is given {len(lists)} times for {len(args.models)} models: give it once, "
            "or once for each"
        )
    plan = plan_of(args)
    # Figures do not depend on the values; a fixed seed makes runs equal all the same.
    torch.manual_seed(0)
    record.set("launch_us", bare_launch_us(plan.device))
    # All models share their code. Without the patch, torch would compile the sizes of a second
    # model as variables.
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        steps = time_all(wanted_pairs(args.models, lists), plan, record)
        for row, step, compiled in steps:
            row |= counted(step, compiled)
            if "launches" in row:
                row["us_per_launch"] = 1e3 * row["host_ms"]["median"] / row["launches"]
            record.write()
    print("\n".join(launches_section([record.results])))
    return record.results
