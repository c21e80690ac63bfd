"""Tells from a path and the first bytes of its file why it is not a checkpoint, and what to do about it.

Nothing here imports torch, so that a command line is answered at once.
"""

import contextlib
import itertools
import os
import re
import shlex
import zipfile

from util.files import LAST_CHECKPOINT
from util.files.names import printable
from util.files.regular import open_regular

ZIP = b"PK\x03\x04"
# Endings of files that may hold weights.
WEIGHTS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
# How many checkpoints are offered in the place of another file, and the words before them.
MOST_LISTED = 3
SUCH_AS = ", such as "
# The header of a safetensors file is JSON of at most this many bytes, after 8 bytes with its length.
_LONGEST_HEADER = 100_000_000
_SAVE = "save the weights by torch.save(model.state_dict(), FILE) in the program that has the model"
_TENSORFLOW = f"a part of a TensorFlow checkpoint: {_SAVE}, or take PyTorch's weights of that model"
# First bytes -> what such a file is, and what to do.
_FORMATS = {
    b"version https://git-lfs": "a Git LFS pointer to a file that was not downloaded: run git lfs pull in "
    "its repository",
    b"<": "a web page, perhaps the answer to a wrong address: download the file again",
    b"\x89HDF": f"an HDF5 file, perhaps of Keras: {_SAVE}",
    b"\x93NUMPY": f"a NumPy array: {_SAVE}",
    **dict.fromkeys((b"\x89PNG", b"\xff\xd8\xff"), "an image: give a checkpoint"),
    **dict.fromkeys(
        (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd", b"Rar!"),
        "a compressed file: unpack it, and give the checkpoint in it",
    ),
}
# The first fields of an ONNX file: a version of the format, and the name of the program that wrote it.
_ONNX = re.compile(rb"\x08[\x01-\x20]\x12[\x01-\x40][\w.]+[\x1a\x22\x2a\x32\x3a]")
_TEXT = bytes(range(32, 127)) + b"\t\n\r"
# Names of Hugging Face's files with weights, whole or in parts.
_HF_WEIGHTS = (r"model(-\d+-of-\d+)?\.safetensors", r"pytorch_model(-\d+-of-\d+)?\.bin")


def problem(path: str) -> str:
    """Why a path is no checkpoint, with the remedy; '' if it may be one, and if there is nothing.

    A folder may be that of a run or of Hugging Face. Files are judged by their first bytes: what lies behind
    those of a checkpoint may be damaged all the same.
    """
    if os.path.isdir(path):
        return _folder_problem(path)
    if not os.path.exists(path) and os.path.exists(f"{path}.index"):
        # TensorFlow's checkpoints are called by what the names of their files have in common.
        path = f"{path}.index"
    if not os.path.isfile(path):
        return ""
    if os.path.getsize(path) == 0:
        cause = "the run that wrote it was interrupted"
        return f"{printable(path)} is empty: {cause}; use another checkpoint{beside(path)}"
    found = _format(path)
    if found:
        return f"{printable(path)} is {found}"
    return ""


def is_safetensors(begin: bytes) -> bool:
    """Whether the first bytes are those of a safetensors file."""
    return begin[8:9] == b"{" and 0 < int.from_bytes(begin[:8], "little") <= _LONGEST_HEADER


def first_bytes(path: str) -> bytes:
    """The first 512 bytes of a regular file."""
    with open_regular(path) as file:
        return file.read(512)


def beside(path: str) -> str:
    """The newest checkpoints in the folder of a file that are not cut off: ", such as A, B"; '' for none."""
    newest: list[str] = []
    # The folder may be unreadable, and other runs may remove files meanwhile.
    with contextlib.suppress(OSError):
        folder = os.path.dirname(path)
        others = [os.path.join(folder, name) for name in os.listdir(folder or ".") if name.endswith(WEIGHTS)]
        others.sort(key=lambda other: (os.lstat(other).st_mtime, other), reverse=True)
        whole = (other for other in others if _is_whole(other) and not os.path.samefile(other, path))
        newest = list(itertools.islice(whole, MOST_LISTED))
    if not newest:
        return ""
    return f"{SUCH_AS}{', '.join(map(printable, newest))}"


def _is_whole(path: str) -> bool:
    """Whether a file has its beginning and its end; nothing else is looked at."""
    if not os.path.isfile(path):
        return False
    begin = first_bytes(path)
    # The header of safetensors says how long it is. The directory of a zip file is at its end.
    if is_safetensors(begin):
        return os.path.getsize(path) > 8 + int.from_bytes(begin[:8], "little")
    return begin.startswith(ZIP) and bool(_zip_names(path)) and not _zip_format(path)


def _zip_names(path: str) -> list[str] | None:
    """The names in a zip file; None for a file that is cut off, [] for one that is damaged elsewhere."""
    try:
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as file:
            return file.namelist()
    except Exception:  # zipfile raises many types, and the reader of checkpoints knows what is damaged
        return []


def hf_weights(folder: str) -> list[str]:
    """Names of the files with the weights of a Hugging Face folder: one, or its parts; [] for none."""
    names = sorted(os.listdir(folder))
    for pattern in _HF_WEIGHTS:
        found = [name for name in names if re.fullmatch(pattern, name)]
        if found:
            return found
    return []


def hf_import(folder: str) -> str:
    """How to make a checkpoint of a Hugging Face folder, as a command line."""
    out = f"{os.path.normpath(os.path.abspath(folder) if folder in ('', '.') else folder)}.pth"
    command = shlex.join(["python", "checkpoints.py", "import", folder or ".", out])
    first = ""
    if not os.path.exists(os.path.join(folder, "config.json")):
        first = f"put the config.json of that model into {printable(folder or '.')}, "
    return f"{first}make a checkpoint of it by {printable(command)}, and give {printable(out)}"


def _folder_problem(path: str) -> str:
    last = os.path.join(path, LAST_CHECKPOINT)
    if os.path.exists(last):
        return problem(last)
    name = printable(path)
    if os.path.exists(os.path.join(path, "config.json")):
        return f"{name} is a folder of Hugging Face's save_pretrained, not a regular file: {hf_import(path)}"
    names = sorted(name for name in os.listdir(path) if name.endswith(WEIGHTS))
    others = [name for name in names if os.path.isfile(os.path.join(path, name))]
    remedy = "give a file"
    if others:
        remedy = f"give one of its files, {', '.join(map(printable, others[:8]))}"
    return f"{name} is a folder without {LAST_CHECKPOINT}, not a regular file: {remedy}"


def _format(path: str) -> str:
    """What a file is instead of a checkpoint, and what to do; '' if it begins like one."""
    # The numbers of TensorFlow's files may begin like anything.
    if re.search(r"\.data-\d+-of-\d+$", path):
        return _TENSORFLOW
    begin = first_bytes(path)
    if begin.startswith(ZIP):
        return _zip_format(path)
    # 0x80 begins the pickles of torch.save before PyTorch 1.6.
    if begin.startswith(b"\x80") or is_safetensors(begin):
        return ""
    return _other_format(path, begin)


def _other_format(path: str, begin: bytes) -> str:
    """What a file is that does not begin like a checkpoint, and what to do."""
    if path.endswith((".index", ".meta")):
        return _TENSORFLOW
    for first, found in _FORMATS.items():
        if begin.lstrip().startswith(first):
            return found
    if path.endswith(".onnx") or _ONNX.match(begin):
        return f"an ONNX file, which is for inference: {_SAVE}"
    if not begin.strip(b"\0"):
        return f"a file of zeros, which was never written completely: use another checkpoint{beside(path)}"
    if begin[257:262] == b"ustar":
        return "a tar file: unpack it, and give the checkpoint in it"
    if not begin.translate(None, _TEXT):
        return _text_format(path)
    return f"neither a file of torch.save nor one of safetensors: give a checkpoint{beside(path)}"


def _zip_format(path: str) -> str:
    """What a zip file is instead of a checkpoint; torch.save writes zip files, too."""
    names = _zip_names(path)
    if names is None:
        return f"truncated: its end is missing; use another checkpoint{beside(path)}"
    ends = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in ends:
        return (
            "a TorchScript file, which holds code: if you trust it, save its weights alone by "
            "torch.save(torch.jit.load(FILE, 'cpu').state_dict(), NEW)"
        )
    if names and all(name.endswith(".npy") for name in names):
        return (
            "a file of NumPy arrays: if it is a Vision Transformer's of JAX, timm converts it by "
            "torch.save(timm.create_model(NAME, checkpoint_path=FILE).state_dict(), NEW)"
        )
    if names and "data.pkl" not in ends:
        return f"a zip file that holds {printable(names[0])}: unpack it, and give the checkpoint in it"
    return ""


def _text_format(path: str) -> str:
    folder = os.path.dirname(path)
    name = os.path.basename(path)
    is_of_hf = name == "config.json" or name.endswith(".index.json")
    if is_of_hf and os.path.exists(os.path.join(folder, "config.json")):
        return f"a metadata file of a Hugging Face folder: {hf_import(folder)}"
    return f"a text file: give a checkpoint{beside(path)}"
