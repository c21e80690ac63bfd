"""Waiting for data: files that are no regular files, and workers that hang, die, or are asked to stop."""

import contextlib
import copy
import faulthandler
import os
import signal
import socket
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils import signal_handling

import engine
from util.data.datasets import ImageDataset
from util.data.loading import waits
from util.data.loading.loader import Loader, build_loader
from util.data.sources import image_index
from util.data.sources.image_index import ImageIndex
from util.data.sources.layouts import build_index
from util.data.sources.listing_cache import stamp
from util.flags.parser import describe


def index_of(folder, *names) -> ImageIndex:
    """An index of files that need not exist."""
    blob = np.frombuffer("".join(names).encode(), np.uint8)
    ends = np.cumsum([len(name) for name in names])
    arrays = dict(names=blob, ends=ends, labels=np.full(len(names), -1, np.int32))
    return ImageIndex(str(folder), str(folder), "files", arrays, labels=False)


def tar_index(tar, size: int, offset: int = 0) -> ImageIndex:
    arrays = dict(
        names=np.frombuffer(b"x.jpg", np.uint8),
        ends=np.array([5]),
        labels=np.full(1, -1, np.int32),
        shard=np.zeros(1, np.int32),
        offset=np.array([offset]),
        size=np.array([size]),
        stamps=np.array([stamp(str(tar))]),
    )
    return ImageIndex(str(tar), "", "tar", arrays, tars=[str(tar)], labels=False)


# --- only regular files are read ---


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "linked.jpg").symlink_to(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    expected = {"pipe": "a named pipe", "zero": "a device", "linked": "a named pipe", "folder": "a folder"}
    names = [f"{name}.jpg" for name in expected]
    index = index_of(tmp_path, *names)
    for i, (name, kind) in enumerate(zip(names, expected.values())):
        with pytest.raises(OSError, match=f"{name} is {kind}, not a regular file"):
            index.read(i)


def test_a_socket_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("s.jpg")
        with pytest.raises(OSError, match=r"s\.jpg"):
            index_of(tmp_path, "s.jpg").read(0)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_tar_that_is_no_regular_file_is_refused(tmp_path, kind):
    tar = tmp_path / "x.tar"
    if kind == "pipe":
        os.mkfifo(tar)
    else:
        tar.symlink_to("/dev/zero")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=rf"x\.tar is a .*{kind}, not a regular file"):
        tar_index(tar, size=10).read(0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_sizes_are_bounded_before_memory_is_taken(tmp_path):
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match=rf"sparse\.jpg claims {1 << 40} bytes, and an image may have up to"):
        index_of(tmp_path, "sparse.jpg").read(0)
    (tmp_path / "x.tar").write_bytes(b"0" * 100)
    for size in (1 << 60, image_index.MAX_BYTES + 1, -1):
        with pytest.raises(OSError, match=rf"x\.jpg in .*x\.tar claims {size} bytes"):
            tar_index(tmp_path / "x.tar", size).read(0)
    with pytest.raises(OSError, match=r"x\.tar ends inside x\.jpg"):
        tar_index(tmp_path / "x.tar", size=image_index.MAX_BYTES, offset=10).read(0)
    assert tar_index(tmp_path / "x.tar", size=7, offset=10).read(0) == b"0" * 7


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    """What comes in parts is joined, what was appended is left out, and a shorter file is an error."""
    path = tmp_path / "a.jpg"
    plain = os.read

    def slowly(descriptor, size):
        path.write_bytes(content_now)
        return plain(descriptor, min(size, 4))

    monkeypatch.setattr(image_index.os, "read", slowly)
    path.write_bytes(b"0123456789")
    content_now = b"0123456789and more"
    assert index_of(tmp_path, "a.jpg").read(0) == b"0123456789"
    path.write_bytes(b"0123456789")
    content_now = b"012345"
    with pytest.raises(OSError, match=r"a\.jpg has become shorter"):
        index_of(tmp_path, "a.jpg").read(0)
    path.write_bytes(b"")
    assert index_of(tmp_path, "a.jpg").read(0) == b""


def test_training_counts_them_as_bad_images(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    os.mkfifo(tmp_path / "train" / "a" / "pipe.jpg")
    torch.manual_seed(0)
    from PIL import Image

    Image.new("RGB", (9, 9)).save(tmp_path / "train" / "a" / "x.png")
    index = build_index(tmp_path, "train")
    dataset = ImageDataset(index, lambda image: image)
    bad = [i for i in range(len(index)) if index.name(i).endswith("pipe.jpg")]
    assert dataset[0, bad[0]]["bad"][:1] == bad


# --- workers ---


class Trouble:
    """A data set of 12 samples, in which `what()` happens to a worker, or to this process, at sample 7.

    Its index has files of the names 0.jpg, 1.jpg, ... and each sample reads its own.
    """

    exact_resume = True

    def __init__(self, folder, what, everywhere=False):
        names = [f"{i}.jpg" for i in range(12)]
        for name in names:
            (folder / name).write_bytes(b"1")
        self.index = index_of(folder, *names)
        self.what = what
        self.everywhere = everywhere

    def __len__(self):
        return 12

    def __getitem__(self, i):
        self.index.read(i)
        if i == 7 and (self.everywhere or get_worker_info() is not None):
            self.what()
        return dict(image=torch.full((1,), i), index=i, bad=[])


def hang():
    while True:
        time.sleep(1)


def kill(number=signal.SIGKILL):
    time.sleep(0.5)  # the parent has fetched the batches before
    faulthandler.disable()  # pytest's would print a stack
    os.kill(os.getpid(), number)


def numbers(batches) -> list[int]:
    return [i for batch in batches for i in batch["index"].tolist()]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(waits, "TICK", 0.05)
    monkeypatch.setattr(waits, "PATIENCE", 0.2)


class Fifo:
    """A reader that waits for the other end of a pipe, as one waits for a file system that has gone."""

    def __init__(self, path):
        self.path = str(path)
        os.mkfifo(path)

    def __call__(self):
        with open(self.path):
            pass


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_does_not_answer_is_named(tmp_path, quick, workers):
    dataset = Trouble(tmp_path, Fifo(tmp_path / "pipe"))
    loader = build_loader(dataset, range(12), batch_size=2, num_workers=workers, data_timeout=0.5 / 60)
    found = []
    begin = time.monotonic()
    with pytest.raises(waits.NoData) as error:
        for batch in loader:
            found += numbers([batch])
    assert found == [0, 1, 2, 3, 4, 5] and time.monotonic() - begin < 20
    assert describe(error.value, {"data_timeout"}) == (
        f"the data workers have not answered for {0.5 / 60:g} minutes, and they are reading 7.jpg in "
        f"{tmp_path}. Repair the file system or the file, or raise --data_timeout"
    )
    # They are gone, although they ignore gentler signals.
    for process in loader.crew.processes:
        # torch's handler of SIGCHLD may raise here instead of in the loop above.
        with contextlib.suppress(RuntimeError):
            process.join(10)
        process.join(10)
    assert [process.exitcode for process in loader.crew.processes] == [-signal.SIGKILL] * workers


def test_a_worker_that_reads_nothing_is_not_blamed(tmp_path, quick):
    dataset = Trouble(tmp_path, hang)
    dataset.index.read = lambda i: b""
    loader = build_loader(dataset, range(12), batch_size=2, num_workers=1, data_timeout=0.2 / 60)
    with pytest.raises(waits.NoData, match="and none of them is reading an image"):
        list(loader)


def test_slow_batches_are_waited_for(tmp_path, quick):
    """Many looks at a wait change no batch and no order; without a limit it may take any time."""
    slow = Trouble(tmp_path, lambda: time.sleep(0.7))
    for minutes in (0, 1):
        loader = build_loader(slow, range(12), batch_size=2, num_workers=2, data_timeout=minutes)
        # The second time the same workers are woken.
        assert numbers(loader) == numbers(loader) == list(range(12))
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize(
    "number, cause",
    [
        (signal.SIGKILL, "no memory is left: lower --num_workers or --batch_size, or ask"),
        (signal.SIGBUS, "/dev/shm is full: lower --num_workers or --batch_size, or enlarge"),
        (signal.SIGABRT, "remove the file, and report the crash"),
    ],
)
def test_a_killed_worker_is_one_line_that_names_its_image(tmp_path, quick, number, cause):
    loader = build_loader(Trouble(tmp_path, lambda: kill(number)), range(12), batch_size=2, num_workers=1)
    found = []
    with pytest.raises(waits.WorkerKilled) as error:
        for batch in loader:
            found += numbers([batch])
    text = describe(error.value, {"num_workers", "batch_size"})
    assert text.startswith(f"a data worker was killed by {number.name} while it read 7.jpg in {tmp_path}, ")
    assert cause in text and "\n" not in text
    assert found == [0, 1, 2, 3, 4, 5] and error.value.number == number


def test_a_worker_that_leaves_is_reported(tmp_path, quick):
    loader = build_loader(Trouble(tmp_path, lambda: os._exit(3)), range(12), batch_size=2, num_workers=1)
    with pytest.raises(waits.WorkerKilled, match=r"ended with exit code 3 while it read 7\.jpg"):
        list(loader)


def test_the_death_of_a_worker_interrupts_nothing_but_a_wait(tmp_path):
    """torch would raise it at once, for example in the middle of an optimizer's step."""
    # Another loader may have left torch's handler behind.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal_handling._SIGCHLD_handler_set = False
    batches = iter(build_loader(Trouble(tmp_path, kill), range(12), batch_size=2, num_workers=1))
    end = time.monotonic() + 2
    # The worker is killed meanwhile, at the fourth batch.
    next(batches)
    next(batches)
    while time.monotonic() < end:
        pass
    with pytest.raises(waits.WorkerKilled):
        list(batches)


def test_a_worker_without_memory_is_one_line(tmp_path):
    def allocate():
        raise MemoryError

    loader = build_loader(Trouble(tmp_path, allocate), range(12), batch_size=2, num_workers=1)
    with pytest.raises(waits.NoData, match="a data worker has no memory left: lower `num_workers`"):
        list(loader)


def test_errors_of_workers_stay_as_they_are(tmp_path):
    def fail():
        raise ValueError("sample 7 is wrong")

    loader = build_loader(Trouble(tmp_path, fail), range(12), batch_size=2, num_workers=2)
    with pytest.raises(ValueError, match="sample 7 is wrong") as error:
        list(loader)
    assert not isinstance(error.value, waits.NoData) and describe(error.value, ()) == "sample 7 is wrong"


def test_outside_of_the_main_thread_batches_come_as_well(tmp_path):
    loader = build_loader(Trouble(tmp_path, int), range(12), batch_size=2, num_workers=1)
    found = []
    thread = threading.Thread(target=lambda: found.extend(numbers(loader)))
    thread.start()
    thread.join(60)
    assert found == list(range(12))


# --- a run ---


def guard_of(received=None, sharded=False, monkeypatch=None, ranks=1, rank=0) -> waits.Guard:
    if monkeypatch is not None:
        monkeypatch.setattr(waits.dist, "world_size", lambda: ranks)
        monkeypatch.setattr(waits.dist, "rank", lambda: rank)
        monkeypatch.setattr(waits.dist, "is_main", lambda: rank == 0)
    return waits.Guard(SimpleNamespace(received=received), sharded)


@pytest.mark.parametrize(
    "received, sharded, rank, leaves",
    [
        ("SIGTERM", False, 0, True),
        (None, False, 0, False),
        ("SIGTERM", True, 0, False),
        ("SIGTERM", False, 1, False),
    ],
)
def test_who_may_leave_while_it_waits(monkeypatch, received, sharded, rank, leaves):
    """Only the rank that has the whole state: the others may be inside of the update that it waits for."""
    assert guard_of(received, sharded, monkeypatch, ranks=2, rank=rank).may_leave() == leaves


def test_a_run_that_is_asked_to_stop_does_not_wait_on(tmp_path, quick):
    loader = build_loader(Trouble(tmp_path, hang), range(12), batch_size=2, num_workers=1)
    guard = guard_of()
    found = []
    with waits.guarded(guard), pytest.raises(waits.StopAsked):
        for batch in loader:
            found += numbers([batch])
            if len(found) == 6:
                guard.stop.received = "SIGTERM"
    assert found == [0, 1, 2, 3, 4, 5]


def test_a_stop_waits_for_a_batch_that_is_only_slow(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(waits, "PATIENCE", 30)
    loader = build_loader(Trouble(tmp_path, lambda: time.sleep(0.5)), range(12), batch_size=2, num_workers=1)
    with waits.guarded(guard_of("SIGTERM")):
        assert numbers(loader) == list(range(12))


def test_a_rank_that_has_lost_a_worker_reads_on_itself(tmp_path, quick, monkeypatch, capsys):
    """All ranks must end the update before they can agree to stop."""
    loader = build_loader(Trouble(tmp_path, kill), range(12), batch_size=2, num_workers=2)
    guard = guard_of(monkeypatch=monkeypatch, ranks=2, rank=1)
    with waits.guarded(guard):
        assert numbers(loader) == list(range(12))
        # In the next epoch too, as the ranks may not have agreed yet.
        assert numbers(loader) == list(range(12))
    assert guard.stop.received == "the loss of a data worker"
    assert guard.failure.startswith(f"rank 1 on {socket.gethostname()}: a data worker was killed by SIGKILL")
    assert capsys.readouterr().out.count("warning: rank 1 on") == 1


@pytest.mark.parametrize("ranks, number", [(1, signal.SIGKILL), (2, signal.SIGABRT)])
def test_others_do_not_read_on(monkeypatch, ranks, number):
    """A single process saves at once, and what has crashed a worker would crash its parent."""
    guard = guard_of(monkeypatch=monkeypatch, ranks=ranks)
    assert not guard.survives(waits.WorkerKilled("a data worker was killed", number))
    assert not guard.failure and guard.stop.received is None


def test_a_stream_does_not_go_on_without_its_workers(tmp_path, quick, monkeypatch):
    class Stream(IterableDataset):
        exact_resume = False

        def __len__(self):
            return 12

        def __iter__(self):
            yield from (dict(image=torch.zeros(1), index=i, bad=[]) for i in range(3))
            kill()

    loader = build_loader(Stream(), None, batch_size=1, num_workers=1)
    with waits.guarded(guard_of(monkeypatch=monkeypatch, ranks=2)), pytest.raises(waits.WorkerKilled):
        list(loader)


def test_an_update_that_cannot_end_leaves_no_trace(tmp_path):
    """Its first micro-batches have changed running statistics; the update is made again from the start."""
    model = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2))
    state = engine.TrainState(
        model, torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", enabled=False)
    )
    before = copy.deepcopy(model.state_dict())

    def batches():
        yield dict(image=torch.randn(4, 1))
        changed.append(not torch.equal(model[1].running_mean, before["1.running_mean"]))
        raise waits.NoData("no batch")

    changed: list[bool] = []
    run = SimpleNamespace(
        budget=SimpleNamespace(accum_iter=2, seed=0),
        bad_images=set(),
        sharded=False,
        wrapped=model,
        setup=SimpleNamespace(autocast=torch.no_grad),
        objective=SimpleNamespace(loss=lambda m, b: (m(b["image"]).sum().requires_grad_(), {})),
    )
    run.bad_images = SimpleNamespace(add=lambda bad: None)
    with pytest.raises(waits.NoData):
        engine.train_one_update(run, state, batches())
    assert changed == [True] and state.step == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_flag_reaches_every_loader(tmp_path):
    import main_finetune
    import main_linprobe
    import main_pretrain
    import main_sere
    from util.data.pixels import Pixels
    from util.flags.parser import parse
    from util.train.setup import Setup

    setup = Setup(torch.device("cpu"), "fp32", (16, 16), Pixels((0.5,) * 3, (0.5,) * 3))
    for main in (main_pretrain, main_finetune, main_linprobe, main_sere):
        command = ["--data_timeout", "2.5", "--batch_size", "2", "--num_workers", "1"]
        if main is main_linprobe:
            command += ["--finetune", "F"]
        args = parse(main.get_args_parser(), command)
        more = [(2, 2), {}] if main is main_sere else [{}]
        found = [loader for loader in main.build_data(args, setup, *more) if isinstance(loader, Loader)]
        assert {loader.crew.minutes for loader in found} == {2.5} and found
