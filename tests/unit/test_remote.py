"""Tars in object stores: they are downloaded once, whole and unchanged, and read as local ones."""

import errno
import hashlib
import io
import json
import os
import shutil
import sys
import threading
import time
from base64 import b64encode
from datetime import timedelta

import pytest
from test_listings import END, FILES, images, packed, pairs

from util.data.sources import remote
from util.data.sources.image_index import NoSplit
from util.data.sources.layouts import build_index, training_classes
from util.dist import group
from util.flags.data_path import DataPath
from util.flags.groups import is_remote_path

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of the local copies."""
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "mae_pl" / "shards"


@pytest.fixture(params=["memory", "file"])
def store(request, tmp_path):
    """A store, and the address of a folder in it."""
    if request.param == "file":
        url = f"file://{tmp_path}/store"
    else:
        url = f"memory://{tmp_path.name}"
    system, root = fsspec.core.url_to_fs(url)
    system.makedirs(root, exist_ok=True)
    yield system, url
    system.rm(root, recursive=True)


def put(store, name, data):
    system, url = store
    system.pipe_file(f"{fsspec.core.url_to_fs(url)[1]}/{name}", data)


def tar(*names):
    return packed({name: FILES[name] for name in names}) + END


def fill(store):
    put(store, "train-0.tar", tar("a/0.jpg", "b/2.jpg"))
    put(store, "train-1.tar", tar("a/1.jpg", "b/x/3.jpg"))
    put(store, "notes.txt", b"x")


def test_which_paths_are_addresses():
    for path in ("s3://b/x", "gs://b", "hf://datasets/a/b", "file:///x", "memory://x"):
        assert is_remote_path(path)
    for path in ("", "x", "/a/b", "http://a/b", "https://a/b", "://x", "./a://b", "wds/x=/y", "C:/x"):
        assert not is_remote_path(path)


def test_shards_of_a_store_are_read_as_local_ones(store, cache, tmp_path, capsys):
    fill(store)
    index = build_index(store[1])
    assert images(index) == FILES and index.labels.tolist() == [0, 0, 1, 1] and index.classes == ["a", "b"]
    assert index.path == store[1] and index.summary() == f"{store[1]}: 4 images, 2 classes (2 tar shards)"
    out = capsys.readouterr().out
    assert f"downloading 2 files of {store[1]} (0.0 GB) to {cache}" in out
    # The second time nothing is downloaded.
    assert images(build_index(store[1] + "/")) == FILES and not capsys.readouterr().out
    for name in ("train-0.tar", "train-1.tar"):
        (tmp_path / "local").mkdir(exist_ok=True)
        shutil.copy(next(cache.glob(f"*/{name}")), tmp_path / "local")
    assert build_index(tmp_path / "local").digest() == index.digest()
    with pytest.raises(
        NoSplit, match=r"no val.tar or val-\*.tar in .*: found notes.txt, train-0.tar, train-1"
    ):
        build_index(store[1], "val")
    put(store, "val.tar", tar("a/0.jpg"))
    assert images(build_index(store[1], "val")) == {"a/0.jpg": FILES["a/0.jpg"]}
    assert len(build_index(store[1])) == 4, "the splits do not disturb each other"


def test_one_tar_and_names_of_classes(store, cache):
    put(store, "x.tar", tar("a/0.jpg", "b/2.jpg"))
    assert len(build_index(f"{store[1]}/x.tar")) == 2
    with pytest.raises(NoSplit, match="is one tar and has no val images"):
        build_index(f"{store[1]}/x.tar", "val")
    put(store, "train.tar", packed(pairs([b"1", b"0"])) + END)
    put(store, "classes.txt", b"owl\ncat\n")
    index = build_index(store[1])
    assert index.classes == ["owl", "cat"] and index.labels.tolist() == [1, 0]
    put(store, "classes.txt", b"fox\ncow\n")
    assert build_index(store[1]).classes == ["fox", "cow"]


def test_the_names_of_training_classes_download_nothing(store, cache):
    fill(store)
    for source in (store[1], f"{store[1]}/train-0.tar", DataPath(store[1], val_share=0.5)):
        assert training_classes(source) == []
    assert not cache.exists()
    # Images that are held out have all classes of training.
    assert build_index(DataPath(store[1], val_share=0.5), "val").classes == ["a", "b"]


def test_a_change_during_the_download_is_noticed(store, cache, monkeypatch):
    fill(store)
    fetch = remote._Downloads.fetch

    def change_after(self, shards):
        fetch(self, shards)
        put(store, "train-1.tar", tar("a/1.jpg"))

    monkeypatch.setattr(remote._Downloads, "fetch", change_after)
    with pytest.raises(ValueError, match="has changed while it was downloaded: start again"):
        build_index(store[1])
    monkeypatch.setattr(remote._Downloads, "fetch", fetch)
    assert set(images(build_index(store[1]))) == {"a/0.jpg", "b/2.jpg", "a/1.jpg"}


def test_the_cache_is_the_users_unless_one_is_given(store, cache, tmp_path):
    fill(store)
    build_index(store[1])
    assert len(list(cache.glob("*/train-*.tar"))) == 2
    given = DataPath(store[1], data_cache=str(tmp_path / "given"))
    assert images(build_index(given)) == FILES
    assert len(list((tmp_path / "given").glob("*/train-*.tar"))) == 2


def test_a_complete_copy_need_not_be_writable(store, cache, monkeypatch):
    fill(store)
    assert len(build_index(store[1])) == 4

    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(remote, "_lock", read_only)
        patch.setattr(os, "makedirs", read_only)
        assert len(build_index(store[1])) == 4
        put(store, "train-2.tar", tar("a/0.jpg"))
        with pytest.raises(ValueError, match=r"cannot hold the tars of .*Read-only"):
            build_index(store[1])
    store[0].rm(f"{fsspec.core.url_to_fs(store[1])[1]}/train-1.tar")
    assert len(build_index(store[1])) == 3


def test_a_shard_that_changes_in_the_store_is_noticed(store, cache, capsys):
    fill(store)
    build_index(store[1])
    time.sleep(0.02)
    # The same size, another content.
    changed = tar("a/0.jpg", "b/2.jpg").replace(b"2" * 512, b"7" * 512)
    put(store, "train-0.tar", changed)
    capsys.readouterr()
    found = images(build_index(store[1]))
    assert found == FILES | {"b/2.jpg": b"7" * 512}
    out = capsys.readouterr().out
    assert "train-0.tar has changed in" in out and "train-1.tar" not in out
    system, url = store
    system.rm(f"{fsspec.core.url_to_fs(url)[1]}/train-0.tar")
    assert set(images(build_index(url))) == {"a/1.jpg", "b/x/3.jpg"}
    assert "train-0.tar is no longer in the store" in capsys.readouterr().out
    # A copy that was damaged is made again.
    (copy,) = cache.glob("*/train-1.tar")
    os.truncate(copy, 512)
    assert len(build_index(url)) == 2 and copy.stat().st_size > 512


class Failing(io.BytesIO):
    """A file of a store whose connection breaks."""

    def __init__(self, data, after):
        super().__init__(data)
        self.after = after
        self.begin = 0

    def seek(self, at, whence=0):
        if whence == 0:
            self.begin = at
        return super().seek(at, whence)

    def read(self, size=-1):
        if self.tell() - self.begin >= self.after:
            raise ConnectionError("reset by peer")
        return super().read(min(size, self.after))


@pytest.mark.parametrize("breaks", [1, 5])
def test_an_interrupted_download_goes_on(store, cache, monkeypatch, breaks):
    data = tar("a/0.jpg", "b/2.jpg")
    put(store, "train.tar", data)
    system, url = store
    reads = []
    opened = type(system).open
    left = [breaks]

    def open_failing(self, path, mode="rb", **options):
        file = opened(self, path, mode, **options)
        if not left[0] or "r" not in mode:
            reads.append(file)
            return file
        left[0] -= 1
        return Failing(file.read(), 1024)

    monkeypatch.setattr(type(system), "open", open_failing)
    monkeypatch.setattr(remote, "CHUNK", 1024)
    if breaks > 3:
        with pytest.raises(ValueError, match=r"train.tar of .* \(ConnectionError: reset by peer\): the same"):
            build_index(url)
        (part,) = cache.glob("*/.train.tar.*.partial")
        assert part.read_bytes() == data[:3072]
        assert not list(cache.glob("*/train.tar"))
        left[0] = 0
    index = build_index(url)
    assert images(index) == {name: FILES[name] for name in ("a/0.jpg", "b/2.jpg")}
    (copy,) = cache.glob("*/train.tar")
    assert copy.read_bytes() == data and not list(cache.glob("*/*.partial"))


def test_parts_of_two_versions_are_not_joined(store, cache):
    fill(store)
    build_index(store[1])
    (copy,) = cache.glob("*/train-0.tar")
    copy.unlink()
    stale = copy.with_name(".train-0.tar.0123.partial")
    stale.write_bytes(b"junk")
    assert images(build_index(store[1])) == FILES and not stale.exists()
    # A part that is longer than the file is thrown away.
    copy.unlink()
    record = json.loads((copy.parent / ".train-0.tar.json").read_text())
    digest = hashlib.sha256(repr(record).encode()).hexdigest()[:16]
    part = copy.with_name(f".train-0.tar.{digest}.partial")
    part.write_bytes(b"x" * 99999)
    assert images(build_index(store[1])) == FILES and not part.exists()


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_checksums_of_the_store_are_compared(tmp_path, cache, monkeypatch, kind):
    data = tar("a/0.jpg", "b/2.jpg")
    store = fsspec.filesystem("memory"), f"memory://{tmp_path.name}"
    put(store, "train.tar", data)
    sums = {"good": hashlib.new(kind, data), "bad": hashlib.new(kind, b"")}
    info = type(store[0]).info
    fields = {}
    monkeypatch.setattr(type(store[0]), "info", lambda self, path: info(self, path) | fields)
    monkeypatch.setattr(type(store[0]), "ls", lambda self, path, detail: [self.info(f"{path}/train.tar")])
    for name in ("bad", "good"):
        if kind == "md5":
            fields["md5Hash"] = b64encode(sums[name].digest()).decode()
        else:
            fields["lfs"] = {"sha256": sums[name].hexdigest()}
        if name == "good":
            assert len(build_index(store[1])) == 2
            continue
        with pytest.raises(
            ValueError, match=f"train.tar of .* has another {kind} than in the store: start again"
        ):
            build_index(store[1])
        assert not list(cache.glob("*/*.tar")) and not list(cache.glob("*/.*.partial"))


def test_room_is_checked_before_the_first_byte(store, cache, monkeypatch):
    fill(store)
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 100))
    with pytest.raises(
        ValueError, match=r"needs 0.0 GB in .*0.0 GB are free: give another folder by `data_cache`"
    ):
        build_index(store[1])
    assert not list(cache.glob("*/*.tar")) and not list(cache.glob("*/.*.partial"))


def test_a_long_download_says_how_long_the_other_nodes_wait(store, cache, monkeypatch, capsys):
    fill(store)
    monkeypatch.setattr(remote, "timeout", lambda: timedelta(minutes=45))
    waits = "the other nodes wait up to 45 minutes for this download"
    for ranks, long in ((1, 1e3), (4, 5e9), (4, 1e3)):
        shutil.rmtree(cache, ignore_errors=True)
        monkeypatch.setattr(remote, "LONG", long)
        # This process has not rank 0, whose lines alone are printed otherwise.
        monkeypatch.setattr(group, "rank", lambda: 1)
        monkeypatch.setattr(remote.dist, "world_size", lambda ranks=ranks: ranks)
        assert images(build_index(store[1])) == FILES
        out = capsys.readouterr().out
        assert out.count(waits) == out.count("`dist_timeout`") == out.count("\n") == (ranks * long == 4e3)


def test_what_is_missing_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"nosuch://b/x cannot be read \(ValueError: Protocol not known"):
        build_index("nosuch://b/x")
    with pytest.raises(ValueError, match=r"memory://none/x cannot be read \(FileNotFoundError"):
        build_index("memory://none/x")
    store = fsspec.filesystem("memory"), f"memory://{tmp_path.name}"
    put(store, "a.jpg", b"x")
    with pytest.raises(ValueError, match=r"found a.jpg. A store holds images in tars: .*repack"):
        build_index(store[1])
    put(store, "train.tar", b"junk")
    given = DataPath(store[1], data_cache=str(tmp_path / "file" / "x"))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match=r"`data_cache` .*file/x/\w+ cannot hold the tars of memory://"):
        build_index(given)

    def without(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", without)
    for scheme, package in (("s3", "s3fs"), ("gs", "gcsfs"), ("hf", "huggingface_hub")):
        with pytest.raises(ValueError, match=f"{scheme}://b/x needs a package .*: pip install {package}"):
            build_index(f"{scheme}://b/x")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ValueError, match="pip install fsspec"):
        build_index("s3://b/x")


def test_local_paths_need_no_fsspec(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    (tmp_path / "train.tar").write_bytes(tar("a/0.jpg", "b/2.jpg"))
    assert len(build_index(tmp_path)) == 2


def test_the_others_wait_for_the_one_that_downloads(tmp_path, cache, monkeypatch, capsys):
    pytest.importorskip("fcntl")
    store = fsspec.filesystem("memory"), f"memory://{tmp_path.name}"
    fill(store)
    begun = threading.Event()
    go_on = threading.Event()
    downloads = []
    fetch = remote._Downloads.fetch

    def slow(self, shards):
        downloads.append(len(shards))
        begun.set()
        assert go_on.wait(30)
        fetch(self, shards)

    monkeypatch.setattr(remote._Downloads, "fetch", slow)
    found = []
    threads = [threading.Thread(target=lambda: found.append(images(build_index(store[1])))) for _ in range(3)]
    threads[0].start()
    assert begun.wait(30)
    for thread in threads[1:]:
        thread.start()
    time.sleep(0.1)
    assert not found
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert found == [FILES] * 3 and downloads == [2]
    assert f"another process downloads {store[1]}: waiting for it" in capsys.readouterr().out
