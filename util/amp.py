"""Mixed precision: what --amp means on a device."""
import contextlib

import torch

AMP = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager:
    """The context in which a forward pass runs at precision fp32, bf16 or fp16."""
    return torch.autocast(device.type, dtype=AMP[amp], enabled=AMP[amp] is not None)


def resolve_amp(amp: str, device: torch.device) -> str:
    """The precision that --amp auto means on a device: bf16 on GPUs that have it, else fp16; fp32 on the CPU."""
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "fp32"
