"""Mixed precision: the meaning of fp32, bf16, fp16 and auto on a device."""

import contextlib
import time

import torch
from torch import Tensor

from util import dist

# A precision whose products have less than this share of fp32's speed is emulated. Measured on a core of a
# Sapphire Rapids, with oneDNN kept to older instructions: bf16 0.02 (AVX2), 0.16 to 0.29 (AVX-512) and 1.7
# (AMX), fp16 0.7 (AMX).
EMULATED = 0.5
AMP = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager:
    """Return the context in which a forward pass runs at precision fp32, bf16 or fp16."""
    return torch.autocast(device.type, dtype=AMP[amp], enabled=AMP[amp] is not None)


def products(device: torch.device) -> str:
    """Return the precision of float32 matrix products.

    "TF32" has 11 bits of precision; `dist.init` turns it on for CUDA. Everywhere else it is "fp32".
    """
    if device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        return "TF32"
    return "fp32"


def described(amp: str, device: torch.device) -> str:
    """Return the name of a precision for messages; fp32 names the precision of its products if that is
    lower.
    """
    if amp == "fp32" and products(device) == "TF32":
        return "fp32 with TF32 products"
    return amp


def resolve_amp(amp: str, device: torch.device) -> str:
    """Resolve "auto" on a device: bf16 on GPUs that support it, fp16 on other GPUs, fp32 elsewhere.

    Prints a warning for a precision that the CPU emulates.
    """
    if amp != "auto":
        _warn_if_emulated(amp, device)
        return amp
    if device.type != "cuda":
        return "fp32"
    # Older GPUs emulate bf16, which is slower than fp16 there.
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp16"


def _warn_if_emulated(amp: str, device: torch.device) -> None:
    dtype = AMP[amp]
    if device.type != "cpu" or dtype is None:
        return
    share = relative_speed(dtype)
    if share < EMULATED:
        dist.print_rank0(
            f"warning: this CPU emulates {amp}, and a matrix product takes {1 / share:.0f} times as long as "
            "in fp32: `amp` fp32 is faster here"
        )


def relative_speed(dtype: torch.dtype, side: int = 192) -> float:
    """Return the speed of a matrix product of that type on this CPU, as a multiple of fp32's.

    A product of `side` x `side` matrices takes 0.1 ms in fp32 and up to 15 ms where it is emulated.
    """
    return _seconds(torch.ones(side, side)) / _seconds(torch.ones(side, side, dtype=dtype))


def _seconds(x: Tensor, repeats: int = 3) -> float:
    """The shortest time of a product of `x` with itself, after one that sets up what it needs."""
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        x @ x
        times.append(time.perf_counter() - start)
    return min(times[1:])
