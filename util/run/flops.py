"""Model FLOPs utilisation: the products of an update, each counted once, and the device's rate of linear layers."""

import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

# Attention on a CPU, which torch's own table lacks in some versions, is counted as on a GPU.
_FUSED, _FUSED_ON_CPU = "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"
_FORMULAS = {
    getattr(torch.ops.aten, _FUSED_ON_CPU + end): flop_registry[getattr(torch.ops.aten, _FUSED + end)]
    for end in ("", "_backward")
} | flop_registry


class FlopCounter(TorchDispatchMode):
    """Counts in `total` the floating-point operations of matrix products, convolutions and attention that run within it.

    Kernels run as they would without it, compiled ones too: results have the same bits. What is seen is the work below
    autograd, so that products inside an autograd function (the sweep over pairs of relative labels) count like others.
    Products that backward repeats are left out, those of gradient checkpointing and those inside fused attention: they
    save memory and are no work of the model. In compiled code the former cannot be told from the rest.
    """

    def __init__(self):
        super().__init__()
        self.total, self._tracker = 0, ModuleTracker()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Without this torch.compile would not compile what it first meets within the counter."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        op = getattr(func, "_overloadpacket", None)
        # Backward runs with gradients off; what it runs a second time is a forward pass, with them on.
        if op in _FORMULAS and not (self._tracker.is_bw and torch.is_grad_enabled()):
            flops = _FORMULAS[op](*args, **kwargs, out_val=out)
            if "attention" in str(op) and str(op).endswith("backward"):
                flops = flops * 4 // 5  # four products make the gradients, the fifth is q k^T once more
            if isinstance(flops, int):  # else a compiler looks on, with sizes that are symbols
                self.total += flops
        return out


def peak_flops(
    model: nn.Module, device: torch.device, dtype: torch.dtype, compile_mode: str | None
) -> float | None:
    """What utilisation is a share of; None where the model's work cannot be counted.

    That is so where compiled code repeats work to save memory, where it has products of its own (max-autotune's templates),
    and where it is replayed as CUDA graphs.
    """
    recomputed = any(getattr(m, "grad_checkpointing", False) for m in model.modules())
    uncounted = compile_mode not in (None, "default") or (compile_mode is not None and recomputed)
    if device.type not in ("cpu", "cuda") or uncounted:
        return None
    return matmul_rate(device, dtype)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square `F.linear`: what the device really gives.

    It is the product that models use, x @ weight.T. In bfloat16 on a CPU without AVX-512, x @ weight takes five times
    as long, so that models would seem to run faster than the device multiplies. The result is the fastest within a tenth
    of a second. No global random generator is touched.
    """
    generator = torch.Generator(device).manual_seed(0)
    n, seconds = 128, 0.0
    while (
        n < 8192 and seconds < 0.01
    ):  # a processor without instructions for a precision is a hundred times slower
        n *= 2
        x, weight = (torch.randn(n, n, device=device, dtype=dtype, generator=generator) for _ in range(2))
        seconds = min(linear_seconds(x, weight) for _ in range(2))
    begin = time.monotonic()
    while time.monotonic() - begin < 0.1:
        seconds = min(seconds, linear_seconds(x, weight))
    return 2 * n**3 / seconds


def linear_seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
    """Seconds of x @ weight.T, without a bias."""
    synchronize(x.device)
    begin = time.perf_counter()
    F.linear(x, weight)
    synchronize(x.device)
    return time.perf_counter() - begin


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
