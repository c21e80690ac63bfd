"""Whole programs, which run without this toolkit: ONNX files, and those of torch.export."""

import contextlib
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tools.deploy.inputs import InputFacts
from tools.deploy.models import Program, program_of
from tools.formats import LIMIT, appears_whole, refuse_above_limit
from util.weights.types import Checkpoint

# Format -> the ending of its files.
SUFFIXES = {"onnx": (".onnx",), "torchexport": (".pt2",)}
INPUT = "images"
# The name of the facts in the archive of torch.export.
FACTS = "metadata.json"
# Numbers of images that the programs are compared on. A program is written for two of them, and one is the
# number that a program may have been specialised to.
BATCHES = (1, 2, 3)
# An ONNX file is a message of protobuf, which holds up to 2 GiB.
MOST_BYTES = 2**31
# What a package is needed for, which none of the other formats needs.
_INSTALL = 'pip install ".[onnx]"'

# Images -> the outputs by name.
Runner = Callable[[Tensor], dict[str, Tensor]]


@torch.no_grad()
def export_program(path: str, out: str, to: str) -> float:
    """Write the model in `path` as a program to `out`, in the format `to`, a key of `SUFFIXES`.

    It takes any number of normalised images of the checkpoint's size; `Program` lists its outputs. Returns
    the largest difference between the outputs of the program, read back, and of the model, relative to the
    largest output if that is above 1. Raises ValueError if the model cannot be a program, if a package is
    missing, and if the outputs differ too much. Nothing is left behind then.
    """
    if to == "onnx":
        _check_installed()
    program, checkpoint = program_of(path)
    facts = _facts(program, checkpoint)
    with appears_whole(out, checkpoint.path) as partial:
        run, reader = _WRITERS[to](program, facts, partial)
        difference = 0.0
        if run is not None:
            difference = _largest_difference(program, run)
            refuse_above_limit(difference, checkpoint.path, reader)
    found = f"{reader} was not compared, because onnxruntime is not installed: {_INSTALL}"
    if run is not None:
        numbers = ", ".join(map(str, BATCHES[:-1]))
        found = (
            f"largest difference to the {' and '.join(program.outputs)} of {reader}, for {numbers} and "
            f"{BATCHES[-1]} images: {difference:.2g}"
        )
    print(f"wrote {out}; {found}\n{_usage(program, out, to)}\n{_described(facts)}")
    return difference


def _check_installed() -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"`to` onnx needs {' and '.join(missing)}, not installed here: {_INSTALL}")


def _facts(program: Program, checkpoint: Checkpoint) -> dict[str, Any]:
    """What a user of the program must know, by name."""
    model = program.model
    facts = InputFacts.of(checkpoint, model.img_size, model.in_chans)
    found = facts.metadata() | {"outputs": list(program.outputs)}
    if program.outputs == ("logits",) and checkpoint.classes:
        found["classes"] = checkpoint.classes
    if note := facts.note():
        print(f"{checkpoint.path}: {note}")
    return found


def _described(facts: dict[str, Any]) -> str:
    """A line on the images that the program takes, and on the facts that its file holds."""
    height, width = facts["size"]
    names = ", ".join(name for name in facts if name not in ("input", "outputs"))
    return (
        f"`{INPUT}` is float32 (any number, {facts['channels']}, {height}, {width}), normalised; the file "
        f"holds {names}"
    )


def _usage(program: Program, out: str, to: str) -> str:
    first = program.outputs[0]
    if to == "onnx":
        names = ", ".join(program.outputs)
        return f"onnxruntime.InferenceSession({out!r}).run(None, {{{INPUT!r}: {INPUT}}}) returns [{names}]"
    return f"torch.export.load({out!r}).module()({INPUT})[{first!r}]"


def example(program: Program, batch: int) -> Tensor:
    """Random images (batch, in_chans, H, W) for a program."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, program.model.in_chans, *program.model.img_size, generator=generator)


def _largest_difference(program: Program, run: Runner) -> float:
    """The largest difference between outputs, relative to the largest value of the output, or to 1."""
    largest = 0.0
    for batch in BATCHES:
        images = example(program, batch)
        found = run(images)
        for name, expected in program(images).items():
            if found[name].shape != expected.shape:
                return float("nan")
            difference = (found[name] - expected).abs().max() / expected.abs().max().clamp(min=1)
            # nan, which is larger than nothing, must not be lost.
            if not difference <= largest:
                largest = float(difference)
            if not largest <= LIMIT:
                return largest
    return largest


def _exported(program: Program) -> torch.export.ExportedProgram:
    """The program as torch.export traces it, for any number of images."""
    images = example(program, 2)
    shapes = {"images": {0: torch.export.Dim("batch")}}
    try:
        return torch.export.export(program, (images,), dynamic_shapes=shapes)
    except Exception as error:  # torch has many types for what it cannot trace
        raise ValueError(
            f"torch cannot make a program of {type(program.model).__name__}: {_reason(error)}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Show no warnings, for torch's own code, which warns of itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _reason(error: BaseException) -> str:
    """The first line of the first cause of an error; those of the converter explain themselves at length."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# -- the writers: each writes `partial`, and returns how to run what it reads back ---------------------------
def _write_onnx(program: Program, facts: dict[str, Any], partial: str) -> tuple[Runner | None, str]:
    size = sum(weight.numel() * weight.element_size() for weight in program.state_dict().values())
    if size >= MOST_BYTES:
        raise ValueError(
            f"the weights take {size / 2**30:.1f} GiB, and an ONNX file holds less than 2 GiB: export with "
            "`to` torchexport"
        )
    traced = _exported(program)
    try:
        with _quiet():
            found = torch.onnx.export(
                traced,
                input_names=[INPUT],
                output_names=list(program.outputs),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # torch has many types for what it cannot convert
        raise ValueError(
            f"torch cannot convert {type(program.model).__name__} to ONNX: {_reason(error)}"
        ) from error
    assert found is not None
    # Values are texts.
    found.model.metadata_props.update({name: json.dumps(value) for name, value in facts.items()})
    found.save(partial, external_data=False)
    return _onnx_runner(program, partial), "ONNX Runtime's CPU program"


def _onnx_runner(program: Program, file: str) -> Runner | None:
    """None if ONNX Runtime is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> dict[str, Tensor]:
        outputs = session.run(list(program.outputs), {INPUT: images.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(program.outputs, outputs)}

    return run


def _write_torchexport(program: Program, facts: dict[str, Any], partial: str) -> tuple[Runner, str]:
    with _quiet():
        torch.export.save(_exported(program), partial, extra_files={FACTS: json.dumps(facts)})
        return torch.export.load(partial).module(), "torch.export's program"


_WRITERS: dict[str, Callable[[Program, dict[str, Any], str], tuple[Runner | None, str]]] = {
    "onnx": _write_onnx,
    "torchexport": _write_torchexport,
}
