"""Mixed precision: the meaning of fp32, bf16, fp16 and auto on a device."""

import contextlib

import torch

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
    """Resolve "auto" on a device: bf16 on GPUs that support it, fp16 on other GPUs, fp32 elsewhere."""
    if amp != "auto":
        return amp
    if device.type != "cuda":
        return "fp32"
    # Older GPUs emulate bf16, which is slower than fp16 there.
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp16"
