"""Mixed precision: what --amp means on a device."""

import contextlib

import torch

AMP = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager:
    """The context in which a forward pass runs at precision fp32, bf16 or fp16."""
    return torch.autocast(device.type, dtype=AMP[amp], enabled=AMP[amp] is not None)


def products(device: torch.device) -> str:
    """What float32 matrix products run in: "TF32" (11 bits of precision) on CUDA, as `dist.init` sets it, else "fp32"."""
    tf32 = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return "TF32" if tf32 else "fp32"


def described(amp: str, device: torch.device) -> str:
    """A precision as the output names it: fp32 says what its products run in, where that is not float32."""
    return "fp32 with TF32 products" if amp == "fp32" and products(device) == "TF32" else amp


def resolve_amp(amp: str, device: torch.device) -> str:
    """The precision that --amp auto means on a device: bf16 on GPUs that have it, else fp16; fp32 on the CPU."""
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "fp32"
