"""Checkpoints that are damaged, or made to do harm: each is refused in one line, or loads as it was saved."""

import argparse
import copy
import json
import os
import pickle
import random
import struct
import tracemalloc
import zipfile
import zlib

import pytest
import torch

import tiny  # noqa: F401 (registers mae_test and vit_test)
from backbones.registry import build_classifier, known_classes, trained_options
from models_mae_pl import MODELS
from tools import convert, inspect
from tools.stored_model import model_of
from util.dist import fsdp
from util.files.formats import beside
from util.train.optim import adamw, lars, param_groups
from util.train.state import TrainState
from util.weights import checkpoint, transfer
from util.weights.files import load

FLAGS = {"model": "mae_test", "input_size": [32], "pos_label": "apl", "num_heads": 2}


def refusal(path, *parts, use=load) -> str:
    """The error of `use(path)`, which must be one line that names the file and has all `parts`."""
    with pytest.raises(ValueError) as error:
        use(str(path))
    message = str(error.value)
    assert len(message.splitlines()) == 1 and message.isprintable(), message
    assert os.path.basename(path) in message and len(message) < 1000, message
    for part in parts:
        assert part in message, message
    return message


def run_state(seed: int = 0) -> TrainState:
    """A small pretraining with a teacher, after two updates."""
    torch.manual_seed(seed)
    model = MODELS["mae_test"](img_size=(32, 32))
    teacher = torch.nn.Linear(3, 2)
    optimizer = adamw(param_groups(model, 0.05), 1e-3, (0.9, 0.95))
    state = TrainState(model, optimizer, torch.amp.GradScaler("cpu"), extras={"teacher": teacher})
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    state.step = 13
    state.meters = {"loss": 2.5}
    return state


@pytest.fixture(scope="module")
def content() -> dict:
    return run_state().to_dict(epoch=2, updates=4, flags=FLAGS) | {"classes": ["a", "b"]}


def changed(content: dict, place: tuple, value) -> dict:
    """A copy of the content with another value at a place."""
    content = copy.deepcopy(content)
    part = content
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    return content


def resume(path: str) -> TrainState:
    state = run_state(seed=1)
    state.load_checkpoint(load(path), updates=4)
    return state


# -- damage --------------------------------------------------------------------------------------------------
def small_file(path) -> dict:
    torch.manual_seed(0)
    saved = {"model": {"a.weight": torch.randn(7, 5), "b": torch.randn(40)}, "args": {"x": 1}, "epoch": 3}
    torch.save(saved, path)
    return saved


def test_no_single_bit_flip_loads_as_other_weights(tmp_path):
    path = tmp_path / "c.pth"
    saved = small_file(path)
    whole = path.read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(300):
        flipped = bytearray(whole)
        bit = draw.randrange(8 * len(whole))
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = load(str(path))
        except ValueError as error:
            assert "c.pth" in str(error) and len(str(error).splitlines()) == 1
            refused += 1
        else:
            assert all(torch.equal(found.model[k], v) for k, v in saved["model"].items()), bit
            assert (found.args, found.epoch) == ({"x": 1}, 3), bit
    # Other bits are padding, dates and the like.
    assert refused > 100


def test_damage_in_the_directory_of_a_file_is_never_a_traceback(tmp_path):
    """zipfile raises errors of many types, NotImplementedError among them."""
    path = tmp_path / "c.pth"
    small_file(path)
    whole = path.read_bytes()
    refused = 0
    for i in range(whole.index(b"PK\1\2"), len(whole)):
        for value in (0, 255):
            path.write_bytes(whole[:i] + bytes([value]) + whole[i + 1 :])
            try:
                load(str(path))
            except ValueError as error:
                assert "c.pth" in str(error) and len(str(error).splitlines()) == 1, (i, value)
                refused += 1
            assert beside(str(path)) == ""
    assert refused > 100


def test_a_file_without_lines_is_not_read_at_once(tmp_path):
    """The format before PyTorch 1.6 is searched in pieces, for a word that may lie across two of them."""
    path = tmp_path / "c.pth"
    with open(path, "wb") as file:
        file.write(b"\x80\x02")
        file.truncate(1 << 29)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"c\.pth"):
        load(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 25
    for start in ((1 << 20) - 12, (1 << 20) - 5, 1 << 20):
        path.write_bytes(b"\x80\x02" + b"x" * start + b"bytearray\n" + b"x" * 99)
        refusal(path, "asks for a bytearray")


def test_a_folder_that_cannot_be_listed_offers_nothing(tmp_path, monkeypatch):
    path = tmp_path / "c.pth"
    small_file(path)
    small_file(tmp_path / "d.pth")
    (tmp_path / "link.pth").symlink_to("nowhere")
    assert beside(str(path)) == f", such as {tmp_path}/d.pth"
    # As if another run had removed one meanwhile.
    monkeypatch.setattr(os, "listdir", lambda folder: ["d.pth", "gone.pth"])
    assert beside(str(path)) == ""


def test_damaged_numbers_and_a_damaged_pickle_name_the_record(tmp_path):
    path = tmp_path / "c.pth"
    small_file(path)
    whole = path.read_bytes()
    for record in ("c/data/1", "c/data.pkl"):
        with zipfile.ZipFile(path) as file:
            place = whole.index(file.read(record))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        refusal(path, f"is damaged: the content of {record} does not have the checksum")
        path.write_bytes(whole)
    load(str(path))


@pytest.mark.parametrize("threads", [1, 3])
def test_long_records_are_summed_up_in_parts(tmp_path, monkeypatch, threads):
    from util.weights import archive

    monkeypatch.setattr(archive, "SHARED", 100)
    monkeypatch.setattr(archive, "CHUNK", 64)
    monkeypatch.setattr(archive, "_num_threads", lambda: threads)
    path = tmp_path / "c.pth"
    saved = {"model": {"w": torch.randn(1003), "v": torch.randn(64, 64)}}
    torch.save(saved, path)
    assert all(torch.equal(v, saved["model"][k]) for k, v in load(str(path)).model.items())
    whole = path.read_bytes()
    place = whole.index(saved["model"]["v"].numpy().tobytes()) + 9999
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    refusal(path, "the content of c/data/1 does not have")


def test_checksums_of_parts_make_that_of_the_whole():
    from util.weights.archive import joined_crc

    text = bytes(range(256)) * 30
    for cut in (0, 1, 777, len(text)):
        parts = [zlib.crc32(text[:cut]), zlib.crc32(text[cut:])]
        assert joined_crc(*parts, len(text) - cut) == zlib.crc32(text)


@pytest.mark.parametrize("module", ["zlib", "isal.isal_zlib"])
def test_both_implementations_of_the_checksum_agree(tmp_path, monkeypatch, module):
    from util.weights import archive, files

    crc32 = pytest.importorskip(module).crc32
    monkeypatch.setattr(archive, "crc32", crc32)
    monkeypatch.setattr(files, "crc32", crc32)
    saved = small_file(tmp_path / "c.pth")
    assert all(torch.equal(v, saved["model"][k]) for k, v in load(str(tmp_path / "c.pth")).model.items())
    assert files.digest({"w": torch.arange(12, dtype=torch.int16)}, {"args": "{}"}) == "c82397fa"
    whole = (tmp_path / "c.pth").read_bytes()
    place = whole.index(saved["model"]["b"].numpy().tobytes())
    (tmp_path / "c.pth").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    refusal(tmp_path / "c.pth", "does not have the checksum")


def test_the_checksum_is_zlibs_without_isal(monkeypatch):
    import importlib
    import sys

    from util.weights import archive

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "isal.isal_zlib", None)
        assert importlib.reload(archive).crc32 is zlib.crc32
    importlib.reload(archive)


def test_files_that_were_written_without_checksums_load(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        saved = small_file(tmp_path / "c.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(load(str(tmp_path / "c.pth")).model["b"], saved["model"]["b"])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_flips_in_the_format_before_1_6_are_never_a_traceback(tmp_path):
    path = tmp_path / "old.pth"
    saved = {"model": {"a.weight": torch.randn(7, 5)}, "args": argparse.Namespace(x=1), "epoch": 3}
    torch.save(saved, path, _use_new_zipfile_serialization=False)
    assert load(str(path)).args == {"x": 1}
    whole = path.read_bytes()
    draw = random.Random(0)
    for _ in range(200):
        flipped = bytearray(whole)
        bit = draw.randrange(8 * len(whole))
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            load(str(path))
        except ValueError as error:
            assert "old.pth" in str(error) and len(str(error).splitlines()) == 1


def rewritten(source, target, change, repeat: int = 1) -> None:
    """Write a checkpoint again, with `change` applied to the content of its records, and right checksums."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            for _ in range(repeat):
                new.writestr(name, change(name, old.read(name)))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_records_of_one_name_are_refused(tmp_path):
    small_file(tmp_path / "c.pth")
    rewritten(tmp_path / "c.pth", tmp_path / "d.pth", lambda name, data: data, repeat=2)
    refusal(tmp_path / "d.pth", "two of its records have one name")


def test_a_file_that_unpacks_to_many_times_its_size_is_refused(tmp_path):
    small_file(tmp_path / "c.pth")
    with zipfile.ZipFile(tmp_path / "c.pth", "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("c/data/7", bytes(1 << 25))
    refusal(tmp_path / "c.pth", "many times as large as the file")


def test_a_pickle_that_asks_for_memory_is_refused(tmp_path):
    """A bytearray of 2 GB; torch would make it."""
    small_file(tmp_path / "c.pth")
    pickled = b"\x80\x02cbuiltins\nbytearray\nJ" + struct.pack("<i", 2**31 - 1) + b"\x85R."
    swapped = lambda name, data: pickled if name.endswith("data.pkl") else data  # noqa: E731
    rewritten(tmp_path / "c.pth", tmp_path / "d.pth", swapped)
    refusal(tmp_path / "d.pth", "asks for a bytearray")
    (tmp_path / "old.pth").write_bytes(pickled)
    refusal(tmp_path / "old.pth", "asks for a bytearray")


def test_a_pickle_of_lists_in_lists_is_refused(tmp_path):
    small_file(tmp_path / "c.pth")
    deep = b"]" * 100_000 + b"a" * 99_999

    def nested(name, data):
        # {"model": {}, "args": {"x": [[[...]]]}}
        start = b"\x80\x02}(X\x05\x00\x00\x00model}X\x04\x00\x00\x00args}X\x01\x00\x00\x00x"
        return start + deep + b"su." if name.endswith("data.pkl") else data

    rewritten(tmp_path / "c.pth", tmp_path / "d.pth", nested)
    refusal(tmp_path / "d.pth", "'args.x'", "less nested")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_only_regular_files_are_read(tmp_path, kind):
    path = tmp_path / "c.pth"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    refusal(path, "not a regular file")


# -- types of fields -----------------------------------------------------------------------------------------
def laughs() -> list:
    """A list of ten strings, in lists of ten, twenty times: small as a pickle, without end as text."""
    nested: list = ["a"] * 10
    for _ in range(20):
        nested = [nested] * 10
    return nested


@pytest.mark.parametrize(
    "place, value, parts",
    [
        (("args",), ["x"], ["'args' is a list, expected a dictionary"]),
        (("args",), {1: 2}, ["'args' is a dictionary with the key 1, expected names"]),
        (
            ("args", "x"),
            torch.ones(2),
            ["'args.x' is a tensor (2,) of torch.float32, expected a plain value"],
        ),
        (("args", "x"), 10**300, ["'args.x' is a number of 997 bits"]),
        (("args", "x"), laughs, ["'args.x'", "the flags of a run"]),
        (("args", "num_heads"), "two", ["'args.num_heads' is 'two', expected a whole number"]),
        (("args", "num_heads"), 10**9, ["'args.num_heads' is 1000000000, expected a whole number"]),
        (("args", "model"), [1], ["'args.model' is a list, expected a text"]),
        (("args", "input_size"), 10**9, ["'args.input_size' is 1000000000, expected a whole number"]),
        (("args", "std"), [0.0], ["'args.std'", "numbers above 0"]),
        (("args", "new_parameters"), [1], ["'args.new_parameters' is a list, expected a list of names"]),
        (("classes",), 5, ["'classes' is 5, expected a list of names"]),
        (("classes",), ["a", 1], ["'classes'"]),
        (("classes",), ["a", "a"], ["'classes' is a list in which a name is repeated"]),
        (("meters",), "none", ["'meters' is 'none', expected a dictionary"]),
        (("meters", "loss"), "0.5", ["'meters.loss' is '0.5', expected a number"]),
        (("meters", "loss"), float("nan"), ["'meters.loss' is nan, expected a finite number"]),
        (("step",), 10**12, ["'step' is 1000000000000, expected a whole number"]),
        (("step",), 10**6, ["'step' is 1000000, expected 12 to 16 after epoch 2 of 4 updates each"]),
        (("step",), True, ["'step' is True, expected a whole number"]),
        (("epoch",), "2", ["'epoch' is '2', expected a whole number"]),
        (("updates_per_epoch",), 0, ["'updates_per_epoch' is 0, expected a whole number from 1"]),
        (("best",), "high", ["'best' is 'high', expected a number"]),
        (("best_epoch",), 1.5, ["'best_epoch' is 1.5, expected a whole number"]),
        (("scaler",), [1], ["'scaler' is a list, expected a dictionary"]),
        (("scaler", "scale"), "big", ["'scaler.scale' is 'big', expected a number"]),
        (("optimizer",), 3, ["'optimizer' is 3, expected a dictionary"]),
        (("teacher",), [1], ["'teacher' is a list, expected a dictionary"]),
        (("teacher", "weight"), 1, ["'teacher.weight' is a int, expected a dense tensor"]),
        (("ema",), 0.99, ["'ema' is 0.99, expected a dictionary"]),
        (("model", 7), torch.ones(1), ["'model' is a dictionary with the key 7, expected names as keys"]),
        ((7,), 1, ["an entry named 7"]),
        (("model", "module.cls_token"), torch.ones(1, 1, 32), ["has weights twice"]),
    ],
)
def test_each_field_has_its_type(tmp_path, content, place, value, parts):
    if callable(value):
        value = value()
    torch.save(changed(content, place, value), tmp_path / "c.pth")
    refusal(tmp_path / "c.pth", *parts)


@pytest.mark.parametrize(
    "make, part",
    [
        (lambda: torch.ones(1, 1, 32).to_sparse(), "a sparse or nested tensor"),
        (lambda: torch.ones(1, 1, 32, dtype=torch.complex64), "a tensor of torch.complex64"),
        (lambda: torch.empty(1, 1, 32, device="meta"), "a tensor on meta without values"),
        (lambda: torch.quantize_per_tensor(torch.ones(1, 1, 32), 0.1, 0, torch.qint8), "torch.qint8"),
        (lambda: torch.zeros(1).expand(10**12), "of shape (1000000000000,) with fewer numbers than that"),
        (lambda: torch.full((1, 1, 32), float("nan")), "a tensor with nan or infinite numbers"),
        (lambda: torch.full((1, 1, 32), -float("inf")), "a tensor with nan or infinite numbers"),
        (lambda: [1.0], "a list"),
        (lambda: None, "None"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_weights_are_dense_and_finite_tensors(tmp_path, content, make, part):
    for entry, name in (("model", "cls_token"), ("teacher", "weight")):
        torch.save(changed(content, (entry, name), make()), tmp_path / "c.pth")
        refusal(tmp_path / "c.pth", f"'{entry}.{name}' is ", part)


@pytest.mark.filterwarnings("ignore")
def test_nested_tensors_have_no_shape_to_show(tmp_path, content):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    for place in (("args",), ("meters", "loss"), ("model", "cls_token")):
        torch.save(changed(content, place, nested), tmp_path / "c.pth")
        refusal(tmp_path / "c.pth", "nested tensor")


def test_numbers_whose_sum_overflows_are_finite(tmp_path):
    torch.save({"model": {"w": torch.full((9,), 6e4).half()}}, tmp_path / "c.pth")
    assert load(str(tmp_path / "c.pth")).model["w"].dtype is torch.float16


def test_many_weights_that_share_their_numbers_are_refused(tmp_path):
    shared = torch.ones(2**21)
    torch.save({"model": {f"w{i}": shared for i in range(30)}}, tmp_path / "c.pth")
    refusal(tmp_path / "c.pth", "tensors of 251658240 bytes, expected what a file of its size can hold")
    # Weights may be tied.
    torch.save({"model": {f"w{i}": shared for i in range(2)}}, tmp_path / "c.pth")
    assert len(load(str(tmp_path / "c.pth")).model) == 2


def test_entries_of_other_projects_stay_as_they_are(tmp_path):
    other = {"state_dict": {"w": torch.ones(2)}, "metric": "x", "lr_scheduler": [1], "model_ema": 5}
    torch.save(other | {"optimizer": None, "epoch": None, "scaler": {}}, tmp_path / "c.pth")
    found = load(str(tmp_path / "c.pth"))
    assert found.entries["metric"] == "x" and found.entries["model_ema"] == 5 and found.args == {}


def test_flags_of_other_programs_may_have_our_names(tmp_path, content):
    foreign = {"finetune": True, "std": 0.02, "head": 12, "model": {"name": "x"}, "mask_ratio": [0.1, 0.2]}
    torch.save({"model": content["model"], "args": foreign | {"lr": 0.1}}, tmp_path / "c.pth")
    assert load(str(tmp_path / "c.pth")).args == {"lr": 0.1}
    # The number of heads is not guessed if one is stored, whatever it is.
    for heads in ([2, 4], 0, 10**9, "2"):
        torch.save({"model": content["model"], "args": {"num_heads": heads}}, tmp_path / "c.pth")
        part = "`num_heads` is "
        refusal(tmp_path / "c.pth", part, "expected a whole number", use=lambda p: model_of(load(p)))
        refusal(tmp_path / "c.pth", part, "expected a whole number", use=inspect.describe)


# -- optimizer state -----------------------------------------------------------------------------------------
def test_a_whole_file_resumes(tmp_path, content):
    torch.save(content, tmp_path / "c.pth")
    state = resume(str(tmp_path / "c.pth"))
    assert (state.step, state.meters) == (13, {"loss": 2.5})
    now = state.to_dict(2, 4, FLAGS)
    for number, values in content["optimizer"]["state"].items():
        for name, value in values.items():
            assert torch.equal(now["optimizer"]["state"][number][name], value)
    assert now["optimizer"]["param_groups"] == content["optimizer"]["param_groups"]


@pytest.mark.parametrize(
    "place, value, parts",
    [
        (
            ("state", 0, "exp_avg"),
            torch.ones(3),
            ["'optimizer.state.0.exp_avg' is of shape (3,)", "(32,)"],
        ),
        (("state", 0, "exp_avg"), torch.tensor(1.0), ["'optimizer.state.0.exp_avg' is of shape ()"]),
        (("state", 0, "exp_avg_sq"), None, ["'optimizer.state.0.exp_avg_sq' is missing"]),
        (("state", 0, "exp_avg_sq"), torch.ones(32).to_sparse(), ["a sparse or nested tensor"]),
        (("state", 0, "exp_avg_sq"), torch.ones(32, dtype=torch.complex64), ["torch.complex64"]),
        (("state", 0, "exp_avg_sq"), torch.ones(32, dtype=torch.int64), ["of torch.int64"]),
        (("state", 0, "exp_avg"), torch.full((32,), float("inf")), ["nan or infinite numbers"]),
        (("state", 0, "exp_avg_sq"), torch.full((32,), float("nan")), ["nan or infinite numbers"]),
        (("state", 0, "exp_avg_sq"), torch.linspace(1, -1, 32), ["negative numbers, expected means of"]),
        (("state", 0, "exp_avg"), torch.empty(32, device="meta"), ["on meta without values"]),
        (("state", 0, "exp_avg"), torch.ones(1).expand(32), ["with fewer numbers"]),
        (("state", 0, "max_exp_avg_sq"), torch.ones(5), ["max_exp_avg_sq' is of shape (5,)"]),
        (("state", 0, "more"), "x", ["'optimizer.state.0.more' is a str"]),
        (("state", 0, "step"), torch.ones(4), ["'optimizer.state.0.step' is of shape (4,)"]),
        (("state", 0, "step"), "3", ["'optimizer.state.0.step' is no count of steps"]),
        (("state", 0, "step"), torch.tensor(float("nan")), ["no count of steps"]),
        (("state", 0, "step"), -1, ["no count of steps"]),
        (("state", 0), [1], ["'optimizer.state.0' is a list"]),
        (("state", 999), {}, ["the state of a parameter that does not exist"]),
        (("state", "x"), {}, ["'optimizer.state' is a key of another type"]),
        (("state",), [1], ["'optimizer.state' is missing or of another type"]),
        (("param_groups",), {}, ["'optimizer.param_groups' is missing or of another type"]),
        (("param_groups", 0), 5, ["'optimizer.param_groups.0' is without a list of parameters"]),
        (("param_groups", 0, "params"), [3, 3], ["'optimizer.param_groups' is of other parameters"]),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_an_optimizer_state_that_does_not_fit_is_refused(tmp_path, content, place, value, parts):
    torch.save(changed(content, ("optimizer", *place), value), tmp_path / "c.pth")
    refusal(tmp_path / "c.pth", *parts, use=resume)


def test_options_of_a_stored_group_are_those_of_this_run(tmp_path, content):
    changes = {"lr": "high", "betas": 5, "capturable": True, "unknown": object}
    groups = content["optimizer"]["param_groups"]
    other = [group | changes | {"unknown": [1]} for group in groups]
    torch.save(changed(content, ("optimizer", "param_groups"), other), tmp_path / "c.pth")
    state = resume(str(tmp_path / "c.pth"))
    assert state.to_dict(2, 4, FLAGS)["optimizer"]["param_groups"] == groups
    state.optimizer.step()


def test_steps_that_are_numbers_become_tensors():
    """Older optimizers counted in numbers; torch looks at the first parameter only."""
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, foreach=True)
    moments = {"exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    states = {0: moments | {"step": torch.tensor([3.0])}, 1: moments | {"step": 3}}
    fsdp.load_optimizer(optimizer, {"state": states, "param_groups": [{"params": [0, 1]}]})
    for p in parameters:
        p.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(parameters[0], parameters[1])
    assert [float(optimizer.state[p]["step"]) for p in parameters] == [4.0, 4.0]


def test_momentum_is_compared_with_its_parameter():
    head = torch.nn.Linear(3, 2)
    optimizer = lars([head], [1.0], 0.1, 0.0)
    groups = [{"params": [0]}, {"params": [1]}]
    for value, part in ((torch.ones(2, 2), "of shape (2, 2)"), (None, "a NoneType")):
        saved = {"state": {0: {"momentum_buffer": value}}, "param_groups": groups}
        with pytest.raises(ValueError) as error:
            fsdp.load_optimizer(optimizer, saved, "c.pth")
        assert str(error.value).startswith("c.pth: its entry 'optimizer.state.0.momentum_buffer' is " + part)
    # torch's SGD stores None for a momentum that it does not use.
    plain = torch.optim.SGD(head.parameters(), lr=0.1)
    saved = {"state": {0: {"momentum_buffer": None}}, "param_groups": [{"params": [0, 1]}]}
    fsdp.load_optimizer(plain, saved)


def test_further_modules_and_the_scaler_fit_the_run(tmp_path, content):
    torch.save(changed(content, ("teacher", "weight"), torch.ones(5)), tmp_path / "c.pth")
    refusal(tmp_path / "c.pth", "entry 'teacher' does not fit", "weight is (5,), not (2, 3)", use=resume)
    torch.save(changed(content, ("teacher", "weight"), torch.ones(2, 3).long()), tmp_path / "c.pth")
    refusal(tmp_path / "c.pth", "weight is of torch.int64, not torch.float32", use=resume)
    torch.save(changed(content, ("scaler",), {"scale": 2.0}), tmp_path / "c.pth")
    refusal(tmp_path / "c.pth", "entry 'scaler' is missing growth_factor", use=resume)
    torch.save(changed(content, ("scaler", "scale"), -1.0), tmp_path / "c.pth")
    refusal(tmp_path / "c.pth", "entry 'scaler' is a scale of -1.0", use=resume)


# -- architecture --------------------------------------------------------------------------------------------
def pretrained(content: dict, **weights) -> dict:
    return {"model": content["model"] | weights, "args": dict(FLAGS)}


@pytest.mark.parametrize(
    "weights, parts",
    [
        ({"blocks.999999999.y": torch.ones(1)}, ["blocks.999999999"]),
        ({"blocks.2.y": torch.ones(1)}, ["lacks blocks.2.norm1.weight"]),
        ({"blocks.x.y": torch.ones(1)}, ["blocks.x"]),
        ({"blocks.\u0663.y": torch.ones(1)}, ["blocks.\u0663"]),
        ({f"blocks.{'9' * 5000}.y": torch.ones(1)}, ["blocks.9999"]),
        ({"blocks.\x1b[31m.y": torch.ones(1)}, ["blocks.\\x1b[31m"]),
        ({"decoder_blocks.5.y": torch.ones(1)}, ["decoder_blocks.5"]),
        ({"patch_embed.proj.weight": torch.ones(32)}, ["'patch_embed.proj.weight' is a tensor (32,)"]),
        ({"patch_embed.proj.weight": torch.ones(32, 0, 8, 8)}, ["expected 4 sizes above 0"]),
        ({"decoder_embed.weight": torch.ones(10**6, 1)}, ["'decoder_embed.weight' is a tensor (1000000, 1)"]),
        ({"blocks.1.mlp.fc1.weight": torch.ones(7, 7)}, ["'blocks.1.mlp.fc1.weight' is a tensor (7, 7)"]),
        ({"decoder_pos_embed": torch.ones(17, 32)}, ["'decoder_pos_embed' is a tensor (17, 32)"]),
        ({"pos_head.a\nb.x": torch.ones(1)}, ["a\\nb"]),
    ],
    ids=lambda x: str(x)[:40].encode("unicode_escape").decode(),
)
def test_names_and_shapes_do_not_make_a_large_model(tmp_path, content, weights, parts):
    torch.save(pretrained(content, **weights), tmp_path / "c.pth")
    refusal(tmp_path / "c.pth", *parts, use=lambda path: model_of(load(path)))
    if "pos_head." not in str(weights):
        refusal(tmp_path / "c.pth", *parts, use=lambda path: convert.export(path, f"{path}.pth", "encoder"))
    # A description of the file does not build the model, and escapes names.
    assert "\x1b" not in inspect.describe(str(tmp_path / "c.pth"))


def test_flags_that_do_not_fit_the_weights_are_named(tmp_path, content):
    for flags, part in (
        ({"num_heads": 5}, "`dim` 32 is not a multiple of `num_heads` 5"),
        ({"pos_tokens": "third"}, "third"),
    ):
        torch.save({"model": content["model"], "args": FLAGS | flags}, tmp_path / "c.pth")
        refusal(tmp_path / "c.pth", "its flags do not fit its weights", part, use=lambda p: model_of(load(p)))


def test_a_size_of_images_needs_no_table_of_any_size(tmp_path):
    encoder = build_classifier("vit_test", img_size=(32, 32), num_classes=3, pos_embed="none")
    torch.save({"model": encoder.state_dict(), "args": {"input_size": [65536, 65536]}}, tmp_path / "c.pth")
    refusal(tmp_path / "c.pth", "'args.input_size'", "65536x65536 pixels", use=lambda p: model_of(load(p)))


@pytest.mark.parametrize(
    "name, value",
    [
        ("pos_embed", torch.ones(17)),
        ("pos_embed", torch.ones(1, 1, 32)),
        ("pos_embed", torch.ones(1, 18, 32)),
        ("patch_embed.proj.weight", torch.ones(32)),
        ("patch_embed.proj.weight", torch.ones(32, 0, 8, 8)),
        ("patch_embed.proj.weight", torch.ones(32, 1, 8, 8).bool()),
    ],
)
def test_weights_that_are_adapted_have_sizes(name, value):
    model = build_classifier("vit_test", img_size=(32, 32), num_classes=0, pos_embed="learned", pool="cls")
    weights = model.state_dict() | {name: value}
    with pytest.raises(ValueError):
        transfer.init_encoder(model, checkpoint.Checkpoint("c.pth", weights), "zero")


def test_the_patch_size_of_another_program_may_be_a_number():
    assert trained_options({"patch_size": 8})["patch_size"] == (8, 8)
    for size in (10**9, "none"):
        with pytest.raises(ValueError, match="stored `patch_size`"):
            trained_options({"patch_size": size})


def test_a_bias_that_is_one_number_counts_one_output():
    saved = checkpoint.Checkpoint("c.pth", {"head.bias": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="distinguishes 1 classes"):
        known_classes(saved, ["a", "b"])


# -- safetensors and Hugging Face ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "metadata, part",
    [
        ({"args": "[1]"}, "'args' is a list, expected a dictionary"),
        ({"args": "{"}, "'args' is a text that is not JSON"),
        ({"args": "[" * 10**6}, "'args' is a text that is not JSON"),
        ({"classes": "5"}, "'classes' is 5, expected a list of names"),
        ({"args": '{"num_heads": 1.5, "pos_label": "none"}'}, "'args.num_heads' is 1.5"),
        ({"crc32": "00000000"}, "is damaged: its content does not have the checksum"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_metadata_of_another_shape_are_refused(tmp_path, metadata, part):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "c.safetensors", metadata=metadata)
    refusal(tmp_path / "c.safetensors", part)


def test_no_flip_in_an_exported_file_loads_as_other_weights(tmp_path, content):
    torch.save(pretrained(content), tmp_path / "c.pth")
    out = tmp_path / "c.safetensors"
    convert.export(str(tmp_path / "c.pth"), str(out), "safetensors")
    whole = out.read_bytes()
    saved = load(str(out))
    draw = random.Random(0)
    # Half of the flips are in the header.
    header = 8 + int.from_bytes(whole[:8], "little")
    for i in range(100):
        flipped = bytearray(whole)
        bit = draw.randrange(8 * (header if i % 2 else len(whole)))
        flipped[bit // 8] ^= 1 << bit % 8
        out.write_bytes(flipped)
        try:
            found = load(str(out))
        except ValueError as error:
            assert "c.safetensors" in str(error) and len(str(error).splitlines()) == 1
        else:
            # The name of the checksum itself was hit.
            assert b'"crc32"' not in bytes(flipped[:header]) or found.args == saved.args


@pytest.mark.parametrize(
    "text, part",
    [
        ("", "config.json is damaged, it is not JSON: it is empty"),
        ("[1]", "config.json holds a JSON list"),
        ('{"image_size": "x", "num_attention_heads": [2]}', "'args.num_heads' is a list"),
        ('{"image_size": 1e9, "num_attention_heads": 2}', "'args.input_size' is 1000000000.0"),
    ],
)
def test_a_damaged_folder_of_hugging_face_is_named(tmp_path, text, part):
    from safetensors.torch import save_file

    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(text)
    save_file({"layernorm.weight": torch.ones(2)}, folder / "model.safetensors")
    refusal(folder, part, use=inspect.describe)
    (folder / "config.json").write_text(json.dumps({"image_size": 8, "num_attention_heads": 2}))
    query = "encoder.layer.0.attention.attention.query.weight"
    save_file({query: torch.ones(2, 2)}, folder / "model.safetensors")
    refusal(folder, "lacks encoder.layer.0.attention.attention.key.weight", use=inspect.describe)


# -- a damaged last checkpoint -------------------------------------------------------------------------------
@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A folder with whole numbered checkpoints 0 and 10, a damaged 20, and a damaged last one."""
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    for name in ("0", "10", "20", "last", "best"):
        torch.save(
            {"model": {"w": torch.ones(1)}, "args": {"name": name}}, tmp_path / f"checkpoint-{name}.pth"
        )
    for name in ("20", "last"):
        path = tmp_path / f"checkpoint-{name}.pth"
        path.write_bytes(path.read_bytes()[:300])
    return tmp_path


def test_a_requeued_job_continues_from_the_newest_whole_checkpoint(run_folder, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    # The job repeats the flags of its first start.
    for resume in ("", str(run_folder / "checkpoint-0.pth")):
        assert checkpoint.load_start(str(run_folder), resume).args["name"] == "10"
        printed = capsys.readouterr().out
        assert "checkpoint-last.pth is truncated" in printed
        assert f"continues from {run_folder}/checkpoint-10.pth" in printed
    for number in (0, 10):
        (run_folder / f"checkpoint-{number}.pth").unlink()
    other = run_folder / "other.pth"
    torch.save({"model": {"w": torch.ones(1)}, "args": {"name": "other"}}, other)
    assert checkpoint.load_start(str(run_folder), str(other)).args["name"] == "other"
    with pytest.raises(ValueError, match="No numbered checkpoint in that folder is whole"):
        checkpoint.load_start(str(run_folder), "")


def test_by_hand_the_error_names_the_flag_that_works(run_folder, capsys):
    newest = f"{run_folder}/checkpoint-10.pth"
    with pytest.raises(ValueError) as error:
        checkpoint.load_start(str(run_folder), "")
    message = str(error.value)
    # Those that were read as a whole, and no others.
    assert "such as" not in message
    assert f"Undamaged numbered checkpoints: {newest}, {run_folder}/checkpoint-0.pth." in message
    assert f"The same command with `resume` {newest} continues" in message
    # The damaged file itself is no remedy.
    with pytest.raises(ValueError, match="`resume`"):
        checkpoint.load_start(str(run_folder), str(run_folder / "checkpoint-last.pth"))
    assert checkpoint.load_start(str(run_folder), newest).args["name"] == "10"
    assert f"The run continues from {newest}; the damaged file is replaced at the next save" in (
        capsys.readouterr().out
    )
    with pytest.raises(ValueError, match=r"checkpoint-last.pth is .* And .*checkpoint-20.pth is truncated"):
        checkpoint.load_start(str(run_folder), str(run_folder / "checkpoint-20.pth"))


def test_a_last_checkpoint_that_is_not_there_is_named(run_folder):
    (run_folder / "checkpoint-last.pth").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint at .*checkpoint-last"):
        checkpoint.load_start(str(run_folder), str(run_folder / "checkpoint-last.pth"))


def test_a_whole_last_checkpoint_comes_before_resume(run_folder):
    torch.save({"model": {"w": torch.ones(1)}, "args": {"name": "last"}}, run_folder / "checkpoint-last.pth")
    newest = str(run_folder / "checkpoint-10.pth")
    assert checkpoint.load_start(str(run_folder), newest).args["name"] == "last"


def test_all_ranks_fail_if_one_cannot_load(run_folder, monkeypatch):
    newest = str(run_folder / "checkpoint-10.pth")
    answers = lambda own: [own, "rank 1: it is damaged"] if isinstance(own, str) and not own else [own]  # noqa: E731
    monkeypatch.setattr(checkpoint.dist, "gather_objects", answers)
    with pytest.raises(ValueError, match="rank 1: it is damaged"):
        checkpoint.load_start("", newest)


def test_a_pickle_is_not_run(tmp_path):
    """The names that it asks for are listed, and nothing that they could print."""
    (tmp_path / "c.pth").write_bytes(b"\x80\x02c" + b"a\x1b[2J\n" + b"system\n.")
    refusal(tmp_path / "c.pth", "would run code", "a\\x1b[2J.system")
    assert pickle.PROTO  # the first byte above
