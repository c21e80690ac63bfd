"""Compares a stored optimizer state with the parameters that it is for.

torch takes a state of any shape over, and the fused and foreach steps then write beyond its end.
"""

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from util.files.names import one_line

# What Adam keeps of each parameter. Other optimizers start what they lack.
KEPT = {
    torch.optim.Adam: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
}
# The types of stored numbers.
_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8}
    | {torch.int8, torch.int16, torch.int32, torch.int64}
)
_REMEDY = "it is damaged or another program's; use another file, or start from the weights alone"


def _refuse(origin: str, field: str, found: str, expected: str) -> NoReturn:
    raise ValueError(f"{origin}: its entry '{one_line(field)}' is {found}, expected {expected}: {_REMEDY}")


def check_optimizer(saved: Any, optimizer: torch.optim.Optimizer, origin: str) -> None:
    """Raise ValueError, which names `origin` and the field, unless a stored state fits an optimizer.

    It needs parameter groups with as many parameters as those of the optimizer. The state of a parameter may
    be missing: it has had no gradient yet. What is there must have the parameter's shape, and finite numbers.
    """
    for name, kind in (("param_groups", list), ("state", dict)):
        if not isinstance(saved, dict) or not isinstance(saved.get(name), kind):
            _refuse(origin, f"optimizer.{name}", "missing or of another type", f"a {kind.__name__}")
    count = _num_parameters(saved["param_groups"], origin)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # Groups of other sizes have an error of their own.
    if len(parameters) == count:
        for number, state in saved["state"].items():
            if type(number) is not int or not 0 <= number < count:
                _refuse(origin, "optimizer.state", _unknown(number), f"numbers from 0 to {count - 1}")
            _check_state(f"optimizer.state.{number}", state, parameters[number], optimizer, origin)


def _num_parameters(groups: list[Any], origin: str) -> int:
    """The number of parameters in stored groups. Raises ValueError unless they are numbered from 0."""
    numbers = []
    for i, group in enumerate(groups):
        if not isinstance(group, dict) or not isinstance(group.get("params"), list):
            _refuse(origin, f"optimizer.param_groups.{i}", "without a list of parameters", "a group")
        numbers += group["params"]
    if any(type(i) is not int for i in numbers) or numbers != list(range(len(numbers))):
        _refuse(origin, "optimizer.param_groups", "of other parameters", "parameters numbered from 0")
    return len(numbers)


def _unknown(number: Any) -> str:
    if type(number) is int:
        return "the state of a parameter that does not exist"
    return "a key of another type"


def _check_state(
    field: str, state: Any, parameter: Tensor, optimizer: torch.optim.Optimizer, origin: str
) -> None:
    """Raise ValueError unless `state` is what the optimizer keeps of a parameter."""
    if not isinstance(state, dict) or any(type(name) is not str for name in state):
        _refuse(origin, field, f"a {type(state).__name__}", "a dictionary with names as keys")
    for name in KEPT.get(type(optimizer), ()):
        if state.get(name) is None:
            _refuse(origin, f"{field}.{name}", "missing", f"what {type(optimizer).__name__} keeps")
    for name, value in state.items():
        if name == "step":
            _check_step(value, f"{field}.step", origin)
        # torch's SGD notes None for a momentum that it does not use.
        elif value is not None or not isinstance(optimizer, torch.optim.SGD):
            _check_value(value, parameter, f"{field}.{name}", origin)


def _check_step(value: Any, field: str, origin: str) -> None:
    if torch.is_tensor(value):
        found = unfit(value)
        if not found and value.numel() != 1:
            found = f"of shape {tuple(value.shape)}"
        if found:
            _refuse(origin, field, found, "one number")
        value = value.item()
    if type(value) not in (int, float) or not (math.isfinite(value) and 0 <= value < 2**53):
        _refuse(origin, field, "no count of steps", "a number from 0")


def _check_value(value: Any, parameter: Tensor, field: str, origin: str) -> None:
    found = unfit(value)
    if found:
        _refuse(origin, field, found, "a dense tensor of real numbers")
    # Of a sharded parameter this is the shape of the whole one.
    if value.shape != parameter.shape:
        shape = tuple(parameter.shape)
        _refuse(origin, field, f"of shape {tuple(value.shape)}", f"the parameter's shape, {shape}")
    if not value.is_floating_point():
        _refuse(origin, field, f"of {value.dtype}", "floating-point numbers")
    # Means of squares: the root of a negative number would be nan. One pass finds both faults.
    if field.endswith("_sq") and value.numel():
        low, high = value.aminmax()
        finite = math.isfinite(low) and math.isfinite(high)
        if finite and low < 0:
            _refuse(origin, field, "with negative numbers", "means of squares")
    else:
        finite = is_finite(value)
    if not finite:
        _refuse(origin, field, "with nan or infinite numbers", "finite numbers")


def unfit(value: Any) -> str:
    """What makes a value unfit to be stored numbers, whatever these are; '' if it is fit."""
    if type(value) not in (Tensor, torch.nn.Parameter):
        return f"a {type(value).__name__}"
    if value.layout is not torch.strided or value.is_nested:
        return "a sparse or nested tensor"
    if value.is_quantized or value.dtype not in _DTYPES:
        return f"a tensor of {value.dtype}"
    if value.device.type != "cpu":
        return f"a tensor on {value.device} without values"
    # A view may repeat the few numbers of its storage any number of times.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"a tensor of shape {tuple(value.shape)} with fewer numbers than that"
    return ""


def is_finite(value: Tensor) -> bool:
    """Whether no number is nan or infinite."""
    if not value.is_floating_point():
        return True
    # A sum reads the memory once and allocates nothing. It is finite unless a number is not, or it overflows.
    return math.isfinite(value.sum()) or bool(torch.isfinite(value).all())


def as_step(value: Any) -> Tensor:
    """A count of steps as Adam keeps it: older versions kept a number, and torch looks at the first one only.

    The shape is that of a scalar.
    """
    return torch.as_tensor(value, dtype=torch.float32).reshape(())
