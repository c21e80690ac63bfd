"""Tars in an object store: each is downloaded once, and read from the disk from then on.

A copy lies in `<cache>/<hash of the address>/`, so that listings, labels, exact resume and speed are those of
local tars. Only this module needs fsspec.
"""

import contextlib
import glob
import hashlib
import os
import shutil
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from typing import Any

from util import dist
from util.data.sources.image_index import NoSplit, some_names
from util.data.sources.pairs import NAME_FILES
from util.dist.group import timeout
from util.files.atomic import read_json, sync_folder, write_json
from util.files.names import counted, printable
from util.flags.groups import is_remote_path

CHUNK = 16 << 20  # bytes that are read at a time
DOWNLOADS = 4  # tars at a time
# Bytes of a download that may take longer than the nodes wait for each other.
LONG = 5e9
TRIES = 3
PAUSE = 0.5  # seconds between looks at a lock, and before another try
# Packages that fsspec needs for the stores, by the scheme of the address.
PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "az": "adlfs",
    "abfs": "adlfs",
}
# Fields of the stores that differ between the versions of a file. The first one that a file has is used.
VERSIONS = ("ETag", "etag", "md5Hash", "checksum", "sha256", "blob_id", "LastModified", "mtime", "created")


@dataclass(frozen=True)
class Shard:
    """A file in a store, as it was when it was listed.

    Attributes:
        path: in the store.
        name: of the local copy.
        size: in bytes.
        version: changes when the file changes.
        checksums: of the content, by the name of the hash, where the store has one.
    """

    path: str
    name: str
    size: int
    version: str
    checksums: dict[str, str]

    def record(self) -> dict[str, Any]:
        """Return what is stored beside the local copy."""
        return {key: value for key, value in asdict(self).items() if key in ("size", "version")}


def default_cache() -> str:
    """Return the folder of the local copies if none is chosen."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser(os.path.join("~", ".cache"))
    return os.path.join(home, "mae_pl", "shards")


def local_copy(url: str, split: str, cache: str = "") -> str:
    """Return the local copy of the folder, or of the one tar, at `url`, with all tars of `split`.

    It lies in the folder `cache`, or in `default_cache`.

    What is missing or has changed in the store is downloaded by one process of the node, while the others
    wait. An interrupted download goes on where it stopped.

    Raises ValueError if the store cannot be read or has no such tars, `NoSplit` if only those of this split
    are missing, and ValueError before the first byte if there is no room for them.
    """
    assert is_remote_path(url), url
    store, root = _open_store(url)
    shards = _list(store, root, url, split)
    folder = os.path.join(os.path.expanduser(cache) or default_cache(), _folder_name(url))
    try:
        # A copy that is complete may lie where nothing can be written.
        if not _is_complete(folder, shards, split):
            os.makedirs(folder, exist_ok=True)
            with _lock(os.path.join(folder, ".lock"), url):
                _remove_others(folder, shards, split)
                missing = [shard for shard in shards if not _is_whole(folder, shard)]
                if missing:
                    _Downloads(store, folder, url).fetch(missing)
                    # Parts of two versions may have been joined. The next start sees it in the records.
                    if _list(store, root, url, split) != shards:
                        raise ValueError(f"{printable(url)} has changed while it was downloaded: start again")
    except OSError as error:
        raise ValueError(
            f"`data_cache` {printable(folder)} cannot hold the tars of {printable(url)}: {error}"
        ) from error
    if root.endswith(".tar"):
        return os.path.join(folder, shards[0].name)
    return folder


def _folder_name(url: str) -> str:
    return hashlib.sha256(os.fsencode(url.rstrip("/"))).hexdigest()[:32]


# --- the store ---


def _open_store(url: str) -> tuple[Any, str]:
    """Return the file system of an address, and the path in it."""
    scheme = url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ValueError(
            f"{printable(url)} needs a package that is not installed: pip install fsspec"
        ) from None
    try:
        store, root = url_to_fs(url)
    except ImportError:
        package = PACKAGES.get(scheme, f"the fsspec package for {scheme}://")
        raise ValueError(
            f"{printable(url)} needs a package that is not installed: pip install {package}"
        ) from None
    # An unknown scheme; and stores raise errors of their own for missing credentials.
    except Exception as error:
        raise _refused(url, error) from error
    return store, root.rstrip("/") or root


def _refused(url: str, error: Exception) -> ValueError:
    reason = printable(f"{type(error).__name__}: {error}"[:300])
    return ValueError(f"{printable(url)} cannot be read ({reason}): check the address and your access to it")


def _list(store: Any, root: str, url: str, split: str) -> list[Shard]:
    """Return the tars of a split, and the names of classes beside them."""
    try:
        if root.endswith(".tar"):
            entries = [store.info(root)]
        else:
            # A listing of another moment may lie in fsspec's own cache.
            store.invalidate_cache()
            entries = store.ls(root, detail=True)
    except Exception as error:
        raise _refused(url, error) from error
    files = {os.path.basename(entry["name"]): entry for entry in entries if entry.get("type") == "file"}
    if root.endswith(".tar") and files:
        if split != "train":
            raise NoSplit(f"{printable(url)} is one tar and has no {split} images")
        chosen = list(files)
    else:
        chosen = _chosen(files, split)
        if not chosen:
            raise _no_tars(url, split, sorted(files))
        chosen += [name for name in NAME_FILES if name in files]
    return [_shard(name, files[name], url) for name in chosen]


def _chosen(names: Any, split: str) -> list[str]:
    """Return the tars of a split, as a local folder has them: <split>.tar, or else <split>-*.tar."""
    if f"{split}.tar" in names:
        return [f"{split}.tar"]
    return sorted(name for name in names if name.startswith(f"{split}-") and name.endswith(".tar"))


def _no_tars(url: str, split: str, names: list[str]) -> ValueError:
    error_type = ValueError
    if split != "train":
        error_type = NoSplit
    return error_type(
        f"no {split}.tar or {split}-*.tar in {printable(url)}: found {some_names(names) or 'no files'}. A "
        "store holds images in tars: make them by python -m util.data repack"
    )


def _shard(name: str, entry: dict[str, Any], url: str) -> Shard:
    size = entry.get("size")
    if not isinstance(size, int):
        raise ValueError(
            f"{printable(url)} gives no size of {printable(name)}: a download of it cannot be checked"
        )
    checksums = {}
    # Google's store has base64, others hexadecimal digits. Amazon's ETag need not be a hash of the content.
    if isinstance(entry.get("md5Hash"), str):
        checksums["md5"] = entry["md5Hash"]
    lfs = entry.get("lfs")
    if isinstance(lfs, dict) and isinstance(lfs.get("sha256"), str):
        checksums["sha256"] = lfs["sha256"]
    version = next((str(entry[key]) for key in VERSIONS if entry.get(key)), "")
    return Shard(entry["name"], name, size, version, checksums)


# --- the local copies ---


@contextlib.contextmanager
def _lock(path: str, url: str) -> Iterator[None]:
    """Hold a lock among the processes that see `path`. A process that ends, even killed, gives it back."""
    try:
        import fcntl
    # Windows. Downloads still replace files as a whole.
    except ImportError:
        yield
        return
    with open(path, "wb") as file:
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # Not a lock that waits: a signal must still end this process.
                if not waiting:
                    dist.print_rank0(f"another process downloads {printable(url)}: waiting for it")
                waiting = True
                time.sleep(PAUSE)
        yield


def _record_path(folder: str, name: str) -> str:
    return os.path.join(folder, f".{name}.json")


def _is_whole(folder: str, shard: Shard) -> bool:
    """Tell whether the local copy is the file that the store has."""
    path = os.path.join(folder, shard.name)
    return (
        os.path.isfile(path)
        and os.path.getsize(path) == shard.size
        and _recorded(_record_path(folder, shard.name)) == shard.record()
    )


def _recorded(path: str) -> dict | None:
    # Absent, or damaged: then the file is downloaded again.
    with contextlib.suppress(OSError, ValueError):
        return read_json(path, dict)
    return None


def _is_complete(folder: str, shards: list[Shard], split: str) -> bool:
    """Tell whether the local copies are those of the store, and no others."""
    if not os.path.isdir(folder) or _others(folder, shards, split):
        return False
    return all(_is_whole(folder, shard) for shard in shards)


def _others(folder: str, shards: list[Shard], split: str) -> list[str]:
    """Return the names of local files of this split that the store no longer has, sorted."""
    kept = {shard.name for shard in shards}
    found = [
        f
        for f in os.listdir(folder)
        if f == f"{split}.tar" or (f.startswith(f"{split}-") and f.endswith(".tar"))
    ]
    found += [file for file in NAME_FILES if os.path.exists(os.path.join(folder, file))]
    return sorted(set(found) - kept)


def _remove_others(folder: str, shards: list[Shard], split: str) -> None:
    """Remove local tars of this split that the store no longer has: they would count as shards."""
    for name in _others(folder, shards, split):
        dist.print_rank0(f"{printable(name)} is no longer in the store: its local copy is removed")
        for path in (os.path.join(folder, name), _record_path(folder, name)):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _announce_wait() -> None:
    """Print how long the other nodes wait for this one."""
    minutes = timeout().total_seconds() / 60
    # On any rank: each node has a process that downloads, and the one of rank 0 may be done.
    print(
        f"{socket.gethostname()}: the other nodes wait up to {minutes:g} minutes for this download "
        "(`dist_timeout`). If it takes longer, the run ends, and the same command continues the download",
        flush=True,
    )


def _partial(folder: str, shard: Shard) -> str:
    # The version is in the name, so that parts of two versions are never joined.
    version = hashlib.sha256(repr(shard.record()).encode()).hexdigest()[:16]
    return os.path.join(folder, f".{shard.name}.{version}.partial")


def _continued(folder: str, shard: Shard) -> int:
    """Return how many bytes of a shard an interrupted download has left."""
    path = _partial(folder, shard)
    if os.path.isfile(path):
        return min(os.path.getsize(path), shard.size)
    return 0


class _Downloads:
    """Downloads from one address into one folder."""

    def __init__(self, store: Any, folder: str, url: str):
        self.store = store
        self.folder = folder
        self.url = url
        # Set when one download has failed: the others would go on for hours.
        self.stopped = threading.Event()

    def fetch(self, shards: list[Shard]) -> None:
        """Download shards, some at a time. Raises ValueError if there is no room, or the store fails."""
        needed = sum(shard.size - _continued(self.folder, shard) for shard in shards)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"{printable(self.url)} needs {_gigabytes(needed)} in {printable(self.folder)}, where "
                f"{_gigabytes(free)} are free: give another folder by `data_cache`"
            )
        for shard in shards:
            if os.path.exists(os.path.join(self.folder, shard.name)):
                dist.print_rank0(
                    f"{printable(shard.name)} has changed in {printable(self.url)}: downloaded again"
                )
        files = f"{counted(len(shards), 'file')} of {printable(self.url)}"
        dist.print_rank0(f"downloading {files} ({_gigabytes(needed)}) to {printable(self.folder)}")
        if needed > LONG and dist.world_size() > 1:
            _announce_wait()
        start = time.monotonic()
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            jobs = [pool.submit(self.fetch_one, shard) for shard in shards]
            try:
                for job in as_completed(jobs):
                    job.result()
            except BaseException:
                self.stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        dist.print_rank0(f"downloaded {files} in {time.monotonic() - start:.0f} s")

    def fetch_one(self, shard: Shard) -> None:
        """Download one file. Raises ValueError if the store fails several times."""
        partial = _partial(self.folder, shard)
        self._try_to_complete(shard, partial)
        fault = self._fault(shard, partial)
        if fault:
            os.remove(partial)
            raise ValueError(f"{printable(shard.name)} of {printable(self.url)} {fault}: start again")
        record = _record_path(self.folder, shard.name)
        # Without its record a file counts as missing, so a crash between the steps does no harm.
        with contextlib.suppress(FileNotFoundError):
            os.remove(record)
        os.replace(partial, os.path.join(self.folder, shard.name))
        sync_folder(self.folder)
        write_json(record, shard.record())
        # Parts of versions that are no longer there.
        for other in glob.glob(
            os.path.join(glob.escape(self.folder), f".{glob.escape(shard.name)}.*.partial")
        ):
            os.remove(other)

    def _try_to_complete(self, shard: Shard, partial: str) -> None:
        for tries in range(1, TRIES + 1):
            try:
                self._append_rest(shard, partial)
                return
            # Stores raise errors of many types, most of which pass.
            except Exception as error:
                if tries < TRIES and not self.stopped.is_set():
                    time.sleep(PAUSE * tries)
                    continue
                reason = printable(f"{type(error).__name__}: {error}"[:300])
                raise ValueError(
                    f"{printable(shard.name)} of {printable(self.url)} cannot be downloaded ({reason}): the "
                    "same command goes on where it stopped"
                ) from error

    def _append_rest(self, shard: Shard, partial: str) -> None:
        """Add to a partial file what it lacks."""
        with open(partial, "ab") as file:
            # A longer one cannot be a part of this file.
            if file.tell() > shard.size:
                file.truncate(0)
            left = shard.size - os.path.getsize(partial)
            with self.store.open(shard.path, "rb") as source:
                source.seek(shard.size - left)
                while left and not self.stopped.is_set():
                    data = source.read(min(CHUNK, left))
                    if not data:
                        raise OSError(f"it ends {left} bytes too early")
                    file.write(data)
                    left -= len(data)
            if left:
                raise OSError("another download has failed")
            file.flush()
            os.fsync(file.fileno())

    def _fault(self, shard: Shard, partial: str) -> str:
        """Say which checksum of a whole file is not that of the store; '' for none."""
        for kind, expected in shard.checksums.items():
            with open(partial, "rb") as file:
                digest = hashlib.file_digest(file, kind)
            if expected not in (digest.hexdigest(), b64encode(digest.digest()).decode()):
                return f"has another {kind} than in the store"
        return ""
