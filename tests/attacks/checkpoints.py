"""Damaged and hostile checkpoints through every command that takes one.

A file is used with exactly the values that were written, or refused in one line that names it. Where a format
has no checksums, other values may be read, and must do no harm.

Files in the format before PyTorch 1.6 hold addresses of memory: they differ between two attacks of one seed.
"""

import argparse
import contextlib
import copy
import io
import os
import pathlib
import random
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import models_mae_pl
from attacks import checkpoint_files as contents
from attacks.checkpoint_files import ALL, DEEP, Change
from attacks.children import Begin, Limits, Outcome, Started, judge, measured, watched
from attacks.mutations import changed, set_sizes
from attacks.runs import UPDATES, make_data, stopped, train
from backbones.registry import build_classifier
from recorded_runs import PATHS, flat
from tools.convert import export
from tools.inspect import describe
from util.files import LAST_CHECKPOINT
from util.run.guards import NonFiniteLoss
from util.run.log import Log
from util.train.optim import WeightAverage, adamw, param_groups
from util.train.state import TrainState, apply_gradients
from util.weights import checkpoint, transfer
from util.weights.files import load

LIMITS = Limits(cpu=20, wall=90, memory_mb=600)
BATCH = 10
OTHER_VALUES = "accepted with other values"
EXPORTS = (("encoder", ".pth"), ("mae", ".pth"), ("timm", ".safetensors"), ("safetensors", ".safetensors"))


@dataclass(frozen=True)
class Base:
    """A valid file: what it holds, its bytes, and whether the format has checksums."""

    kind: str
    what: str
    suffix: str
    state: dict[str, Any]
    data: bytes
    checked: bool = True


@dataclass(frozen=True)
class File:
    """A file to judge: with a `change` of contents, or with other bytes and then the values of its base."""

    what: str
    base: Base
    data: bytes
    change: Change | None = None
    suffix: str = ".pth"


# --- files ---


def written(state: Any, **options: Any) -> bytes:
    """Return the bytes of torch's file."""
    file = io.BytesIO()
    torch.save(state, file, **options)
    data = file.getvalue()
    if DEEP.encode() in data:
        data = rewritten(data, lambda name, content: _deepened(content))
    return data


def rewritten(data: bytes, change: Callable[[str, bytes], bytes], **options: Any) -> bytes:
    """Change the records of a zip; their checksums are right again."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", **options) as new:
        for name in old.namelist():
            # Without the time of writing.
            info = zipfile.ZipInfo(name)
            new.writestr(info, change(name, old.read(name)), new.compression, new.compresslevel)
    return file.getvalue()


def _deepened(pickled: bytes, levels: int = 100_000) -> bytes:
    """Put lists within lists in the place of a text: pickle itself cannot write so many."""
    text = b"X" + struct.pack("<I", len(DEEP)) + DEEP.encode()
    return pickled.replace(text, b"]" * levels + b"a" * (levels - 1))


def make_bases(folder: Path) -> list[Base]:
    """Train for three updates, of which the last is in an unfinished epoch, and return the files."""
    make_data(folder / "data")
    states = {}
    for kind in ("pretraining", "fine-tuning"):
        stopped(kind, folder / "data", folder / kind, UPDATES + 1)
        states[kind] = torch.load(folder / kind / LAST_CHECKPOINT, weights_only=True)
        # Names of temporary folders differ between runs, and inputs must not.
        states[kind]["args"] |= {name: "" for name in PATHS if name in states[kind]["args"]}
    pretraining = states["pretraining"]
    args = argparse.Namespace(
        **pretraining["args"] | {"output_dir": pathlib.PosixPath("out"), "log_dir": None}
    )
    mae = {name: pretraining[name] for name in ("model", "optimizer", "scaler", "epoch")} | {"args": args}
    source = folder / "source.pth"
    source.write_bytes(written(pretraining))
    exported = folder / "exported.safetensors"
    with contextlib.redirect_stdout(io.StringIO()):
        export(str(source), str(exported), "safetensors")
    old = written(pretraining, _use_new_zipfile_serialization=False)
    weights = dict(load(str(exported)).model)
    return [
        Base("pretraining", "pretraining", ".pth", pretraining, written(pretraining)),
        Base("fine-tuning", "fine-tuning", ".pth", states["fine-tuning"], written(states["fine-tuning"])),
        Base("pretraining", "of MAE", ".pth", mae, written(mae)),
        Base("pretraining", "before PyTorch 1.6", ".pth", pretraining, old, checked=False),
        Base("encoder", "safetensors", ".safetensors", weights, exported.read_bytes(), checked=False),
    ]


def changed_file(number: int, base: Base, change: Change, draw: random.Random) -> File:
    """Return a file with other contents, in one of torch's two formats."""
    state = copy.deepcopy(base.state)
    with torch.no_grad():
        change.apply(state)
    # Very deep lists are for the new format, whose pickle is a record of its own.
    options = {}
    if draw.random() < 0.2 and "deep" not in change.what:
        options["_use_new_zipfile_serialization"] = False
    return File(f"{base.what}: {change.what}", base, written(state, **options), change)


def damaged_file(base: Base, draw: random.Random, others: list[bytes]) -> File:
    """Return a file with other bytes. Half of the changes of a zip are made where no weights are."""
    if base.suffix == ".pth" and base.checked and draw.random() < 0.5:
        data, what = _damaged_structure(base.data, draw)
    else:
        data, what = changed(base.data, draw, others)
    return File(f"{base.what}: {what}", base, data, suffix=base.suffix)


def _damaged_structure(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Change the pickle, a header of a record, or the directory of a zip."""
    file = bytearray(data)
    marks = [at for magic in (b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6") for at in _all(data, magic)]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        places = [
            (info.header_offset, 80 + info.file_size) for info in archive.infolist() if info.file_size < 20000
        ]
    start, length = draw.choice([*places, *[(at, 60) for at in marks]])
    part = file[start : start + length]
    for _ in range(draw.choice([1, 1, 2, 5])):
        if draw.random() < 0.5:
            part[draw.randrange(len(part))] ^= 1 << draw.randrange(8)
        else:
            part = set_sizes(part, draw, [])
    return bytes(file[:start] + part + file[start + length :]), "structure"


def _all(data: bytes, magic: bytes) -> Iterator[int]:
    at = data.find(magic)
    while at >= 0:
        yield at
        at = data.find(magic, at + 1)


class Runs:
    """What pickle calls when it is loaded."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch owned",)


def hostile_files(bases: list[Base]) -> list[File]:
    """Return files that were made by hand."""
    base, safetensors = bases[0], bases[-1]
    everyone = Change("", lambda state: None, ALL)
    deflated = rewritten(base.data, lambda name, content: content, compression=zipfile.ZIP_DEFLATED)
    bomb = rewritten(
        base.data,
        lambda name, content: content + bytes(700_000_000 if name.endswith("data.pkl") else 0),
        compression=zipfile.ZIP_DEFLATED,
        compresslevel=1,
    )
    code = {"model": base.state["model"], "args": Runs()}
    # A list that is multiplied by itself, in the pickle of a few bytes.
    billion = b"\x80\x02" + b"]" + b"".join(b"q%c]h%ch%ch%ca" % (i, i, i, i) for i in range(1, 30)) + b"."
    torch_files = {
        "code": written(code),
        "code, before PyTorch 1.6": written(code, _use_new_zipfile_serialization=False),
        "a bomb": bomb,
        "lists of lists": rewritten(base.data, lambda n, c: billion if n.endswith("data.pkl") else c),
        "a pickle of nothing": rewritten(base.data, lambda n, c: b"" if n.endswith("data.pkl") else c),
        "an endless stack": rewritten(base.data, lambda n, c: b"(" * 10**5 if n.endswith("data.pkl") else c),
        "a text": b"not a checkpoint\n" * 100,
        "an empty file": b"",
        "an empty zip": b"PK\5\6" + bytes(18),
        "a number": written(5),
        "a list": written([1, 2]),
        "nothing": written({}),
        "half": base.data[: len(base.data) // 2],
        "twice": base.data + base.data[: len(base.data) // 2],
    }
    found = [File(what, base, data, everyone) for what, data in torch_files.items()]
    found.append(File("compressed", base, deflated, Change("", lambda state: None)))
    for what, data in _bad_safetensors(safetensors.state).items():
        found.append(File(f"safetensors, {what}", safetensors, data, everyone, ".safetensors"))
    return found


def _bad_safetensors(weights: dict[str, torch.Tensor]) -> dict[str, bytes]:
    from safetensors.torch import save

    tensors = {name: value.contiguous() for name, value in weights.items()}

    def with_metadata(**texts: str) -> bytes:
        return save(tensors, metadata=texts)

    plain = save(tensors)
    return {
        "flags, a list": with_metadata(args="[1]"),
        "flags, a number": with_metadata(args="5"),
        "flags, no JSON": with_metadata(args="{"),
        "flags, very deep": with_metadata(args="[" * 100_000 + "]" * 100_000),
        "classes, a number": with_metadata(classes="5"),
        "classes, numbers": with_metadata(classes="[1, 2]"),
        "classes, a dictionary": with_metadata(classes='{"a": 1}'),
        "a header of 2^60 bytes": struct.pack("<Q", 2**60) + plain[8:],
        "a header of 0 bytes": struct.pack("<Q", 0) + plain[8:],
        "no header": b"{}",
        "half": plain[: len(plain) // 2],
    }


class Files:
    """Input by its number: first hostile files, then the changes of contents, then drawn damage."""

    def __init__(self, bases: list[Base], seed: int):
        self.bases = bases
        self.seed = seed
        self.given = hostile_files(bases)
        self.changes = contents.changes()

    def file(self, number: int) -> File:
        draw = random.Random(f"checkpoints {self.seed} {number}")
        if number < len(self.given):
            return self.given[number]
        number -= len(self.given)
        if number < len(self.changes):
            # Another kind with another seed.
            return changed_file(number, self.bases[(number + self.seed) % 2], self.changes[number], draw)
        if number % 3 == 0:
            return changed_file(number, draw.choice(self.bases[:2]), contents.drawn(draw), draw)
        return damaged_file(draw.choice(self.bases), draw, [base.data for base in self.bases])


# --- ways of using a file ---


@lru_cache(maxsize=1)
def models() -> dict[str, Any]:
    """Return a model of each kind. A forked child has its own copy of their weights."""
    return {
        "pretraining": models_mae_pl.MODELS["mae_test"](
            img_size=(32, 32), in_chans=3, pos_embed="none", pos_label="apl"
        ),
        "fine-tuning": build_classifier(
            "vit_test", img_size=(32, 32), in_chans=3, num_classes=2, pos_embed="learned", pos_label="none"
        ),
    }


def _loss(kind: str, model: Any) -> torch.Tensor:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    if kind == "fine-tuning":
        return torch.nn.functional.cross_entropy(model(images), torch.tensor([0, 1]))
    return model(images, mask_ratio=0.5)[0]["pixel"]


def resume(path: str, base: Base) -> None:
    """Continue the run: load everything, train for an update, and report it."""
    model = models()[base.kind]
    skip = frozenset()
    if base.kind == "fine-tuning":
        skip = model.no_weight_decay()
    optimizer = adamw(param_groups(model, 0.05, skip), 1e-3, betas=(0.9, 0.95))
    extras = {}
    if base.kind == "fine-tuning":
        extras["ema"] = WeightAverage(model, 0.5)
    state = TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), extras=extras)
    state.load_checkpoint(load(path), UPDATES)
    log = Log(None, print_freq=1)
    epoch, first = divmod(state.step - bool(state.meters), UPDATES)
    log.start_epoch(epoch, epoch + 2, first, UPDATES, 4, state.meters)
    loss = _loss(base.kind, model)
    loss.backward()
    norm = apply_gradients(state, 1.0)
    log.step(state.step, {"loss": loss, "grad_norm": norm}, 1e-3, 0.0)
    log.flush()
    log.end_epoch({})
    assert state.best is None or state.best > -1e9
    broken = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    # A file without checksums may have any finite values.
    assert not (broken and base.checked), f"not finite after an update: {broken[:3]}"


def finetune(path: str, base: Base) -> None:
    transfer.init_encoder(models()["fine-tuning"], load(path), "zero")


def init_from(path: str, base: Base) -> None:
    transfer.init_from(models()["pretraining"], load(path))


def evaluate(path: str, base: Base) -> None:
    checkpoint.load_for_evaluation(models()["fine-tuning"], load(path))


def inspect(path: str, base: Base) -> None:
    text = describe(path)
    assert all(line.isprintable() for line in text.split("\n")), ascii(text)


def exported(path: str, base: Base) -> None:
    """Write the model for another library; nothing is left behind if that fails."""
    target, suffix = random.Random(path + base.what).choice(EXPORTS)
    out = Path(path).parent / "out"
    out.mkdir(exist_ok=True)
    try:
        export(path, str(out / f"exported{suffix}"), target)
    except Exception:
        assert not list(out.iterdir()), f"left behind: {sorted(out.iterdir())}"
        raise


# The one that writes into memory of the optimizer is the last.
WAYS: dict[str, Callable[[str, Base], None]] = {
    "inspect": inspect,
    "export": exported,
    "init_from": init_from,
    "evaluate": evaluate,
    "finetune": finetune,
    "resume": resume,
}
TAKES = {
    "pretraining": ("inspect", "export", "init_from", "finetune", "resume"),
    "fine-tuning": ("inspect", "export", "evaluate", "resume"),
    "encoder": ("inspect", "export", "finetune"),
}


class Judge:
    """Judges files in a folder of its own."""

    def __init__(self, files: Files, data: Path):
        self.files = files
        self.data = data

    def __call__(self, numbers: list[int], begin: Begin) -> Iterator[Outcome]:
        for number in numbers:
            file = self.files.file(number)
            begin(number, file.what)
            outcome = Outcome(number, file.what)
            with tempfile.TemporaryDirectory(prefix="attack-") as folder:
                os.chdir(folder)
                path = Path(folder) / f"hostile{file.suffix}"
                path.write_bytes(file.data)
                if file.change is None:
                    self.bytes_changed(file, str(path), outcome)
                else:
                    self.contents_changed(file, str(path), file.change, outcome)
                if Path("owned").exists():
                    outcome.fail("a program", "the file ran code")
            yield outcome
            # What one file does to the memory must not harm the next: another child goes on.
            if outcome.verdict != "refused" or outcome.failures:
                return

    def bytes_changed(self, file: File, path: str, outcome: Outcome) -> None:
        """Either the values are those of the base, or the file is refused."""
        loaded: list[Any] = []
        if not _used(outcome, "load", path, lambda: loaded.append(load(path))):
            return
        outcome.verdict = "accepted"
        before = Path(path).with_name(f"before{file.suffix}")
        before.write_bytes(file.base.data)
        differences = _differences(load(str(before)), loaded[0])
        if differences and file.base.checked:
            outcome.fail("unnoticed damage", differences[:3])
        elif differences:
            outcome.verdict = OTHER_VALUES
            self.contents_changed(file, path, Change("", lambda state: None), outcome)

    def contents_changed(self, file: File, path: str, change: Change, outcome: Outcome) -> None:
        """Use the file in every way."""
        for way in TAKES[file.base.kind]:
            used = _used(outcome, way, path, lambda way=way: WAYS[way](path, file.base))  # type: ignore[misc]
            if used and way in change.refused:
                outcome.fail("not refused", way)
            elif not used and way in change.read and not outcome.failures:
                outcome.fail("not accepted", way)
            if used and outcome.verdict != OTHER_VALUES:
                outcome.verdict = "accepted"
        if outcome.verdict != "refused" and not outcome.failures:
            self.main(file, path, outcome)

    def main(self, file: File, path: str, outcome: Outcome) -> None:
        """Give a file that some command takes to a real training."""
        kind, flag = file.base.kind, "--resume"
        if kind == "encoder":
            kind, flag = "fine-tuning", "--finetune"
        words = ("--epochs", 2, flag, path)
        _used(outcome, "main", path, lambda: train(kind, self.data, *words), programs=True)


def _used(outcome: Outcome, way: str, path: str, use: Callable[[], Any], programs: bool = False) -> bool:
    """Whether a use of the file ends well. An error must be of the right type and name the file in a line."""
    try:
        with measured(outcome, LIMITS):
            if programs:
                # Mains ask git and the like which version they are.
                use()
            else:
                with watched():
                    use()
    except Started as error:
        outcome.fail("a program", f"{way}: {error}")
    except NonFiniteLoss as error:
        # A run ends so if its file, which has no checksums, holds other and extreme values.
        if outcome.verdict != OTHER_VALUES:
            outcome.fail(type(error).__name__, f"{way}: {error}")
        return False
    except (ValueError, OSError) as error:
        text = str(error)
        if os.path.basename(path) not in text:
            outcome.fail("an error without the file's name", f"{way}: {type(error).__name__}: {text}")
        elif not text.isprintable():
            outcome.fail("an error of several lines", f"{way}: {text}")
        return False
    except Exception as error:
        outcome.fail(type(error).__name__, f"{way}: {error}")
        return False
    return True


def _differences(one: Any, other: Any) -> list[str]:
    """Return the places in which two loaded files differ."""
    values = [
        flat({"model": x.model, "args": x.args, "classes": x.classes, **x.entries}) for x in (one, other)
    ]
    return sorted(k for k in values[0].keys() | values[1].keys() if values[0].get(k) != values[1].get(k))


# --- the attack ---


def attack(count: int, seed: int, keep: Path | None, only: int | None = None) -> list[Outcome]:
    """Judge that many files."""
    with tempfile.TemporaryDirectory(prefix="attack-") as root:
        files = Files(make_bases(Path(root)), seed)
        models()
        numbers = list(range(count))
        if only is not None:
            numbers = [only]
        batches = [numbers[start : start + BATCH] for start in range(0, len(numbers), BATCH)]
        outcomes = judge(batches, Judge(files, Path(root) / "data"), LIMITS)
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            for outcome in outcomes:
                file = files.file(outcome.number)
                if outcome.failures:
                    (keep / f"checkpoint-{outcome.number}{file.suffix}").write_bytes(file.data)
    return outcomes
