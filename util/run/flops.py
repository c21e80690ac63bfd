"""Model FLOPs utilisation: the operations of an update, and the device's rate at linear layers."""

import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

# Some versions of torch have no formula for attention on a CPU. It is counted like attention on a GPU.
_FUSED = "_scaled_dot_product_flash_attention"
_FUSED_ON_CPU = "_scaled_dot_product_flash_attention_for_cpu"
_FORMULAS = {
    getattr(torch.ops.aten, _FUSED_ON_CPU + end): flop_registry[getattr(torch.ops.aten, _FUSED + end)]
    for end in ("", "_backward")
} | flop_registry


class FlopCounter(TorchDispatchMode):
    """Counts in `total` the floating-point operations of matrix products, convolutions and attention.

    Kernels run as they would without the counter, compiled ones too: results have the same bits. The counter
    works below autograd, so it also sees products inside an autograd function, such as the sweep over pairs
    of relative labels. It leaves out products that backward repeats, those of gradient checkpointing and
    those inside fused attention: they save memory and are not work of the model. In compiled code repeated
    products cannot be recognised.
    """

    def __init__(self):
        super().__init__()
        self.total = 0
        self._tracker = ModuleTracker()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch.compile compile functions that it meets first while the counter is active."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        op = getattr(func, "_overloadpacket", None)
        # Backward runs with gradients off. The forward passes that it repeats run with gradients on.
        if op in _FORMULAS and not (self._tracker.is_bw and torch.is_grad_enabled()):
            flops = _FORMULAS[op](*args, **kwargs, out_val=out)
            if "attention" in str(op) and str(op).endswith("backward"):
                # Four of the five products make the gradients. The fifth recomputes q k^T.
                flops = flops * 4 // 5
            # A tracing compiler calls this with symbolic sizes, whose product is not a number.
            if isinstance(flops, int):
                self.total += flops
        return out


def peak_flops(
    model: nn.Module, device: torch.device, dtype: torch.dtype, compile_mode: str | None
) -> float | None:
    """Return the rate that utilisation is a share of, or None if the model's operations cannot be counted.

    Three kinds of compiled code cannot be counted: code that repeats work to save memory, code with products
    of its own (max-autotune's templates), and code that is replayed as CUDA graphs.
    """
    if device.type not in ("cpu", "cuda"):
        return None
    if compile_mode not in (None, "default"):
        return None
    recomputed = any(getattr(module, "grad_checkpointing", False) for module in model.modules())
    if compile_mode is not None and recomputed:
        return None
    return matmul_rate(device, dtype)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a large square `F.linear`.

    That is the product that models use, x @ weight.T. In bfloat16 on a CPU without AVX-512, x @ weight takes
    five times as long, so that models would seem to run faster than the device multiplies. The result is the
    fastest within a tenth of a second. The global random generators are not touched.
    """
    generator = torch.Generator(device).manual_seed(0)
    n = 128
    seconds = 0.0
    # Sizes grow until one takes long enough to time. Processors without instructions for a precision are a
    # hundred times slower, so a large size at once could take minutes.
    while n < 8192 and seconds < 0.01:
        n *= 2
        x = torch.randn(n, n, device=device, dtype=dtype, generator=generator)
        weight = torch.randn(n, n, device=device, dtype=dtype, generator=generator)
        seconds = min(linear_seconds(x, weight) for _ in range(2))
    begin = time.monotonic()
    while time.monotonic() - begin < 0.1:
        seconds = min(seconds, linear_seconds(x, weight))
    # n x n results of n multiplications and n additions each.
    return 2 * n**3 / seconds


def linear_seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
    """Return the seconds of x @ weight.T, without a bias."""
    synchronize(x.device)
    begin = time.perf_counter()
    F.linear(x, weight)
    synchronize(x.device)
    return time.perf_counter() - begin


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
