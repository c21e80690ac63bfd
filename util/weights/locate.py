"""Finds the local file of a checkpoint: the last one of a run's folder, or a download of an address."""

import hashlib
import http.client
import os
import re
import urllib.parse
import urllib.request

import torch

from util import dist
from util.files import LAST_CHECKPOINT, formats
from util.files.atomic import replacing

# Seconds without an answer. Some networks drop what they forbid.
TIMEOUT = 30
_PIECE = 1 << 20
# torch.hub's rule for names: model-0123abcd.pth begins with these digits of its SHA-256.
_HASH = re.compile(r"-([0-9a-f]{8,64})\.")


def is_address(path: str) -> bool:
    """Whether a path is an address of the web."""
    return path.startswith(("https://", "http://"))


def located(path: str) -> str:
    """The file that `path` means: itself, the last checkpoint of a folder, or the download of an address.

    All ranks must call it together for an address. Raises ValueError for a folder without a last checkpoint,
    and if the download fails.
    """
    if is_address(path):
        return _downloaded(path)
    if not os.path.isdir(path):
        return path
    last = os.path.join(path, LAST_CHECKPOINT)
    if os.path.exists(last):
        return last
    raise ValueError(formats.problem(path))


def _downloaded(address: str) -> str:
    """Download a file, unless it was downloaded before. Rank 0 does it for all that see the same folder."""
    if address.startswith("http://") and not _is_local(address):
        raise ValueError(
            f"{address} is not encrypted: give an https address, or download the file and give it"
        )
    path = _cached_name(address)
    # First rank 0, then one rank of each host that has another folder.
    for turn in (dist.is_main(), int(os.environ.get("LOCAL_RANK", 0)) == 0):
        problem = ""
        if turn and not os.path.isfile(path):
            problem = _try_download(address, path)
        problems = [text for text in dist.gather_objects(problem) if text]
        if problems:
            raise ValueError(problem or problems[0])
    if not all(dist.gather_objects(os.path.isfile(path))):
        raise ValueError(f"some nodes do not see {path}: download {address} to a folder that all nodes see")
    return path


def _is_local(address: str) -> bool:
    """Whether an address is of this machine, where nobody can change the file on its way."""
    return urllib.parse.urlsplit(address).hostname in ("localhost", "127.0.0.1", "::1")


def _cached_name(address: str) -> str:
    """Where a file is kept: in torch.hub's folder, and apart from files of that name at other addresses."""
    name = os.path.basename(urllib.parse.unquote(urllib.parse.urlsplit(address).path))
    if name in ("", ".", "..") or not name.isprintable():
        raise ValueError(f"{address} does not end with the name of a file: give the address of a checkpoint")
    place = hashlib.sha256(address.encode()).hexdigest()[:12]
    return os.path.join(torch.hub.get_dir(), "checkpoints", place, name)


def _try_download(address: str, path: str) -> str:
    """Download a file; return the problem in one line, or ''."""
    folder = os.path.dirname(path)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        return f"cannot write {folder} ({error.strerror}): set TORCH_HOME to another folder, or give a file"
    try:
        _download(address, path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = str(error).splitlines() or [type(error).__name__]
        return (
            f"cannot download {address} ({reason[0]}): check the address, or download it where the network "
            "reaches it, and give the file"
        )
    print(f"downloaded {address} to {path}", flush=True)
    return ""


def _download(address: str, path: str) -> None:
    """Write the file at an address. Raises OSError, and ValueError if it is not whole, or another one."""
    request = urllib.request.Request(address, headers={"User-Agent": "mae-pl"})
    digest = hashlib.sha256()
    size = 0
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, replacing(path, "wb") as file:
        while piece := answer.read(_PIECE):
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        announced = answer.headers.get("Content-Length")
        if announced is not None and announced != str(size):
            raise ValueError(f"{size} bytes came, {announced} were announced")
        named = _HASH.search(os.path.basename(path))
        if named and not digest.hexdigest().startswith(named[1]):
            raise ValueError(f"its SHA-256 begins with {digest.hexdigest()[:8]}, not as its name says")
