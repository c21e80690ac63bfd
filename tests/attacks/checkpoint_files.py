"""Changes to the contents of a checkpoint, each with the ways of using the file that must refuse it.

A change gets the state (a deep copy of what the file holds) and changes it in place.
"""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

State = dict[str, Any]
# Ways of using a file; see `attacks.checkpoints`.
RESUME = frozenset({"resume"})
WEIGHTS = frozenset({"resume", "finetune", "init_from", "evaluate", "export"})
ALL = WEIGHTS | {"inspect"}
NONE: frozenset[str] = frozenset()
DEEP = "a deep list is put here"  # what `attacks.checkpoints` replaces in the written file


@dataclass(frozen=True)
class Change:
    """Who must refuse the file, and who must take it; other ways of using it may do either."""

    what: str
    apply: Callable[[State], None]
    refused: frozenset[str] = NONE
    read: frozenset[str] = NONE


def _set(**fields: Any) -> Callable[[State], None]:
    return lambda state: state.update(fields)


def _drop(*names: str) -> Callable[[State], None]:
    return lambda state: [state.pop(name, None) for name in names] and None


def _weight(state: State, name: str = "blocks.0.attn.qkv.weight") -> torch.Tensor:
    return state["model"][name]


def _with_weight(make: Callable[[torch.Tensor], Any]) -> Callable[[State], None]:
    def apply(state: State) -> None:
        for weights in (state["model"], state.get("ema")):
            name = "blocks.0.attn.qkv.weight"
            for key in [k for k in weights or () if k.removeprefix("module.") == name]:
                weights[key] = make(weights[key])

    return apply


def _with_moment(make: Callable[[torch.Tensor], Any], name: str = "exp_avg") -> Callable[[State], None]:
    def apply(state: State) -> None:
        for values in state["optimizer"]["state"].values():
            values[name] = make(values[name])

    return apply


def _with_group(**fields: Any) -> Callable[[State], None]:
    return lambda state: [group.update(fields) for group in state["optimizer"]["param_groups"]] and None


def _with_args(**fields: Any) -> Callable[[State], None]:
    return lambda state: state["args"].update(fields)


def _with_name(name: str) -> Callable[[State], None]:
    """Add a weight, also to the moving average."""

    def apply(state: State) -> None:
        state["model"][name] = torch.zeros(1)
        if "ema" in state:
            state["ema"][f"module.{name}"] = torch.zeros(1)

    return apply


def changes() -> list[Change]:
    """Return the changes that were made by hand."""
    return [*_of_weights(), *_of_names(), *_of_optimizers(), *_of_fields(), *_of_flags(), *_harmless()]


def _of_weights() -> list[Change]:
    nan = float("nan")
    values: dict[str, Callable[[torch.Tensor], Any]] = {
        "weight, sparse": lambda x: x.to_sparse(),
        "weight, compressed rows": lambda x: x.to_sparse_csr(),
        "weight, complex": lambda x: x.to(torch.complex64),
        "weight, quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "weight, on meta": lambda x: x.to("meta"),
        "weight, bool": lambda x: x > 0,
        "weight, whole numbers": lambda x: x.to(torch.int64),
        "weight, not finite": lambda x: x * nan,
        "weight, one value not finite": lambda x: x.index_fill(0, torch.tensor([0]), float("inf")),
        "weight, transposed": lambda x: x.t().contiguous(),
        "weight, one row more": lambda x: torch.cat([x, x[:1]]),
        "weight, a number": lambda x: x.mean(),
        "weight, empty": lambda x: x[:0],
        "weight, one value expanded": lambda x: torch.zeros(1).expand(x.shape[0], 2**40),
        "weight, flat": lambda x: x.reshape(-1),
        "weight, a list": lambda x: x.tolist(),
        "weight, a string": lambda x: "weight",
        "weight, None": lambda x: None,
        "weight, nested": lambda x: {"weight": x},
    }
    return [Change(what, _with_weight(make), WEIGHTS) for what, make in values.items()]


def _of_names() -> list[Change]:
    one = torch.zeros(1)

    def rename(state: State) -> None:
        state["model"]["blocks.0.attn.qkv.wieght"] = state["model"].pop("blocks.0.attn.qkv.weight")

    def without_block(state: State) -> None:
        for name in [name for name in state["model"] if name.startswith("blocks.1.")]:
            del state["model"][name]

    def numbers(state: State) -> None:
        state["model"] = dict(enumerate(state["model"].values()))

    def tuples(state: State) -> None:
        state["model"] = {(name, 1): value for name, value in state["model"].items()}

    def one_number(state: State) -> None:
        state["model"][7] = one

    return [
        Change("a block of number 999999999", _with_name("blocks.999999999.y"), WEIGHTS),
        Change("a block of number 10^30", _with_name(f"blocks.{10**30}.y"), WEIGHTS),
        Change("a block of number -1", _with_name("blocks.-1.y"), WEIGHTS),
        Change("a block of no number", _with_name("blocks.x.y"), WEIGHTS),
        Change("a decoder block of number 99999999", _with_name("decoder_blocks.99999999.y"), WEIGHTS),
        Change("a name with escapes", _with_name("\x1b[2J\n"), RESUME),
        Change("a label head of no kind", _with_name("pos_head.nosuch.weight"), RESUME),
        Change("a name misspelt", rename, WEIGHTS),
        Change("a block missing", without_block, RESUME),
        Change("names, numbers", numbers, ALL),
        Change("names, pairs", tuples, ALL),
        Change("a name, a number", one_number, ALL),
        Change("no weights", lambda s: s.update(model={}, ema={}), WEIGHTS),
        Change("weights, a list", lambda s: s.update(model=list(s["model"].values())), ALL),
        Change("weights, a string", _set(model="model"), ALL),
        Change("weights, None", _set(model=None), ALL),
        Change("weights, a tensor", _set(model=one), ALL),
        Change("weights, missing", _drop("model", "ema"), ALL),
    ]


def _of_optimizers() -> list[Change]:
    def short(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(3)

    def first_moment_of_others(state: State) -> None:
        values = list(state["optimizer"]["state"].values())
        for one, other in itertools.pairwise(values):
            one["exp_avg"] = other["exp_avg"].clone()

    def groups(change: Callable[[list], Any]) -> Callable[[State], None]:
        return lambda state: state["optimizer"].update(
            param_groups=change(state["optimizer"]["param_groups"])
        )

    def states(change: Callable[[dict], Any]) -> Callable[[State], None]:
        return lambda state: state["optimizer"].update(state=change(state["optimizer"]["state"]))

    nan = float("nan")
    moments: dict[str, Callable[[torch.Tensor], Any]] = {
        "of 3 numbers": short,
        "a number": lambda x: x.sum(),
        "empty": lambda x: x[:0],
        "larger": lambda x: torch.zeros(x.numel() + 1),
        "flat": lambda x: x.reshape(-1) if x.dim() > 1 else x[None],
        "sparse": lambda x: x.to_sparse(),
        "complex": lambda x: x.to(torch.complex64),
        "whole numbers": lambda x: x.to(torch.int32),
        "not finite": lambda x: x + nan,
        "on meta": lambda x: x.to("meta"),
        "one value expanded": lambda x: torch.zeros(1).expand(2**40),
        "a string": lambda x: "exp_avg",
        "a list": lambda x: x.tolist(),
        "None": lambda x: None,
    }
    return [
        *(Change(f"exp_avg, {what}", _with_moment(make), RESUME) for what, make in moments.items()),
        Change("exp_avg_sq, of 3 numbers", _with_moment(short, "exp_avg_sq"), RESUME),
        Change("exp_avg_sq, negative", _with_moment(lambda x: x - 1, "exp_avg_sq"), RESUME),
        Change("exp_avg, of other parameters", first_moment_of_others, RESUME),
        Change("optimizer step, of 1000 numbers", _with_moment(lambda x: torch.ones(1000), "step"), RESUME),
        Change("optimizer step, not finite", _with_moment(lambda x: x * nan, "step"), RESUME),
        Change("optimizer step, negative", _with_moment(lambda x: x * 0 - 5, "step"), RESUME),
        Change("optimizer step, a string", _with_moment(lambda x: "1", "step"), RESUME),
        Change("optimizer, a list", _set(optimizer=[1]), RESUME),
        Change("optimizer, None", _set(optimizer=None), RESUME),
        Change("optimizer, empty", _set(optimizer={}), RESUME),
        Change("optimizer groups, none", groups(lambda g: []), RESUME),
        Change("optimizer groups, a number", groups(lambda g: 5), RESUME),
        Change("optimizer groups, swapped", groups(lambda g: g[::-1]), RESUME),
        Change("optimizer groups, numbers", groups(lambda g: [1, 2]), RESUME),
        Change("optimizer groups, without params", groups(lambda g: [{"lr": 1}, {"lr": 1}]), RESUME),
        Change("optimizer state, a list", states(lambda s: list(s.values())), RESUME),
        Change(
            "optimizer state, text as numbers", states(lambda s: {str(k): v for k, v in s.items()}), RESUME
        ),
        Change("optimizer state, of no parameter", states(lambda s: {**s, 10**9: s[0]}), RESUME),
        Change("optimizer state, a number each", states(lambda s: dict.fromkeys(s, 1)), RESUME),
        # The options of this run replace the stored ones.
        Change("optimizer group, rate a string", _with_group(lr="1", betas="x", eps=None)),
        Change("optimizer group, rate not finite", _with_group(lr=nan, weight_decay=nan)),
        Change("optimizer group, another option", _with_group(nosuch=[1], fused="yes", capturable=1)),
    ]


def _of_fields() -> list[Change]:
    nan = float("nan")
    steps: dict[str, Any] = {
        "10^12": 10**12,
        "10^40": 10**40,
        "-1": -1,
        "nan": nan,
        "True": True,
        "half": 0.5,
        "a string": "1",
        "None": None,
        "a tensor": torch.ones(3),
        "a list": [1],
    }
    return [
        # Without a step, as in MAE's files, the run continues after the last epoch.
        *(Change(f"step, {what}", _set(step=x), RESUME) for what, x in steps.items() if x is not None),
        *(
            Change(f"epoch, {what}", lambda s, v=value: s.update(epoch=v), RESUME)  # type: ignore[misc]
            for what, value in steps.items()
            if what not in ("-1", "None")
        ),
        Change("updates_per_epoch, a string", _set(updates_per_epoch="2"), RESUME),
        Change("updates_per_epoch, 0", _set(updates_per_epoch=0), RESUME),
        Change("updates_per_epoch, -1", _set(updates_per_epoch=-1), RESUME),
        Change("meters, a string", _set(meters="meters"), RESUME),
        Change("meters, a list", _set(meters=[1, 2]), RESUME),
        Change("meters, of strings", _set(meters={"loss": "1"}), RESUME),
        Change("meters, of numbers", _set(meters={1: 1.0}), RESUME),
        Change("meters, not finite", _set(meters={"loss": nan, "steps": 1}), RESUME),
        Change("meters, a tensor", _set(meters={"loss": torch.ones(5)}), RESUME),
        Change("best, a string", _set(best="good"), RESUME),
        Change("best, a list", _set(best=[1]), RESUME),
        Change("best, not finite", _set(best=nan), RESUME),
        Change("best_epoch, a string", _set(best_epoch="1"), RESUME),
        Change("best_epoch, 10^12", _set(best_epoch=10**12), RESUME),
        Change("scaler, a list", _set(scaler=[1]), RESUME),
        Change("scaler, rubbish", _set(scaler={"scale": "x", 5: None})),
        Change("classes, 5", _set(classes=5), ALL),
        Change("classes, a string", _set(classes="ab"), ALL),
        Change("classes, numbers", _set(classes=[1, 2]), ALL),
        Change("classes, nested", _set(classes=[["a"], ["b"]]), ALL),
        Change("classes, a dictionary", _set(classes={"a": 1}), ALL),
        Change("ema, a list", _set(ema=[1])),
        Change("ema, a number", _set(ema=5)),
        Change("teacher, a string", _set(teacher="x")),
        Change("fields, numbers", lambda s: s.update({1: 2, 3: 4}), ALL),
        Change("a field, very deep", _set(more=DEEP)),
        Change("flags, very deep", _with_args(more=DEEP)),
    ]


def _of_flags() -> list[Change]:
    values: dict[str, dict[str, Any]] = {
        "input_size, huge": {"input_size": [10**9, 10**9]},
        "input_size, a string": {"input_size": "large"},
        "input_size, a dictionary": {"input_size": {"h": 32}},
        "input_size, 0": {"input_size": 0},
        "patch_size, 0": {"patch_size": [0, 0]},
        "patch_size, a string": {"patch_size": "x"},
        "num_heads, 0": {"num_heads": 0},
        "num_heads, -4": {"num_heads": -4},
        "num_heads, a string": {"num_heads": "2"},
        "num_heads, huge": {"num_heads": 10**9},
        "decoder_heads, 0": {"decoder_heads": 0},
        "model, a list": {"model": ["mae_test"]},
        "model, None": {"model": None},
        "model, a format": {"model": "{0.__class__}%s%n"},
        "model, escapes": {"model": "\x1b[2J\nerror: all is lost"},
        "pos_label, unknown": {"pos_label": "nosuch"},
        "pos_label, a number": {"pos_label": 5},
        "pos_tokens, a list": {"pos_tokens": [1]},
        "pool, a number": {"pool": 5},
        "head, a number": {"head": 5},
        "norm_pix_loss, a string": {"norm_pix_loss": "false"},
        "seed, a string": {"seed": "x"},
        "pos_embed, a list": {"pos_embed": []},
        "a flag, tensors": {"lr": torch.ones(3)},
        "a flag, a long string": {"comment": "x" * 1_000_000},
        "layer_norm_eps, a string": {"layer_norm_eps": "x"},
    }
    lists = {
        "a list": [1],
        "a string": "args",
        "a number": 5,
        "a tensor": torch.ones(2),
        "of numbers": {1: 2},
    }
    return [
        *(Change(f"flags, {what}", _set(args=value), ALL) for what, value in lists.items()),
        *(Change(what, _with_args(**fields)) for what, fields in values.items()),
    ]


def _harmless() -> list[Change]:
    """Files of other versions and projects: they must be read."""

    def half(state: State) -> None:
        state["model"] = {k: v.to(torch.float16).float() for k, v in state["model"].items()}

    def parallel(state: State) -> None:
        state["model"] = {f"module.{k}": v for k, v in state["model"].items()}

    def only(state: State) -> None:
        weights = state["model"]
        state.clear()
        state.update(weights)

    def views(state: State) -> None:
        everything = torch.cat([v.reshape(-1) for v in state["model"].values()])
        parts = everything.split([v.numel() for v in state["model"].values()])
        shapes = [v.shape for v in state["model"].values()]
        state["model"] = dict(zip(state["model"], (p.view(s) for p, s in zip(parts, shapes))))

    start = frozenset({"finetune", "init_from", "inspect", "export"})
    return [
        Change("nothing", lambda s: None, read=ALL),
        Change("rounded", half, read=ALL),
        Change("of DistributedDataParallel", parallel, read=ALL),
        Change("views of one storage", views, read=ALL),
        Change("a further field", _set(note="by hand", more={"a": [1, 2.5, None, True]}), read=ALL),
        Change("a further flag", _with_args(new_flag=3), read=ALL),
        Change("without best and meters", _drop("best", "best_epoch", "meters"), read=ALL),
        Change("without flags", _drop("args"), read=RESUME),
        Change("without optimizer", _drop("optimizer"), RESUME, start),
        Change("weights only", only, RESUME, frozenset({"inspect", "finetune"})),
    ]


# --- drawn changes ---


def junk(draw: random.Random) -> Any:
    """Return a value of any kind that a file can hold."""
    return draw.choice(
        [
            None,
            True,
            -1,
            0,
            5,
            10**12,
            10**40,
            1.5,
            float("nan"),
            float("inf"),
            "",
            "text",
            "\x1b[31m\n",
            b"bytes",
            [],
            [1, "a"],
            (),
            {},
            {"a": 1},
            {1: 2},
            {(1, 2): []},
            torch.ones(3),
            torch.tensor(float("nan")),
            torch.zeros(0),
            torch.ones(2, dtype=torch.complex64),
            torch.ones(2, 2).to_sparse(),
            torch.zeros(2, 2, dtype=torch.bool),
        ]
    )


def drawn(draw: random.Random) -> Change:
    """Return a change that puts junk in one to three places of any depth. It must do no harm, in any way."""
    places: list[str] = []

    def apply(state: State) -> None:
        for _ in range(draw.choice([1, 1, 2, 3])):
            holder: Any = state
            path = []
            while True:
                keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
                if not keys:
                    break
                key = draw.choice(keys)
                path.append(str(key))
                inner = holder[key]
                if isinstance(inner, (dict, list)) and inner and draw.random() < 0.7:
                    holder = inner
                    continue
                if isinstance(holder, dict) and draw.random() < 0.15:
                    del holder[key]
                else:
                    holder[key] = junk(draw)
                break
            places.append("/".join(path))

    return Change("junk", apply)
