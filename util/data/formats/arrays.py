"""NumPy arrays, .npy and .npz: any number of bands and every depth."""

import io
import math
import zipfile
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from util.data.formats.settings import LARGEST_EXACT, Facts, ReadSettings, check_pixels, picked

NPY_MAGIC = b"\x93NUMPY"
LONGEST_HEADER = 1 << 16  # bytes of a .npy file before its values
ZIP_MAGIC = b"PK\x03\x04"
# Types that a tensor of pixels can have, and what the others become.
KEPT = (np.uint8, np.uint16, np.int16, np.float32)
WIDENED: dict[Any, Any] = {
    np.int8: np.int16,
    np.int32: np.float32,
    np.uint32: np.float32,
    np.int64: np.float32,
    np.uint64: np.float32,
    np.float16: np.float32,
    np.float64: np.float32,
}


def is_npy(data: bytes | memoryview) -> bool:
    """Tell whether a file is a NumPy array."""
    return data[:6] == NPY_MAGIC


def decode_npy(data: bytes | memoryview, read: ReadSettings) -> torch.Tensor:
    """Decode (H, W), (H, W, C) or (C, H, W) -> (C, H, W); see `decode`.

    (H, W) is grey, and becomes three equal channels if three are wanted.
    """
    shape, order, dtype, axis, start, shared = _layout(_header_bytes(data), read)
    count = math.prod(shape)
    left = len(data) - start
    if left < count * dtype.itemsize:
        raise ValueError(f"{shape} needs {count * dtype.itemsize} bytes, and {left} follow its header")
    if shared is not None and isinstance(data, memoryview):
        image = torch.frombuffer(data, dtype=shared, count=count, offset=start)
        image = image.view(-1, *shape[-2:])  # (H, W) -> (1, H, W)
    else:
        # The bytes of the file, not a copy.
        array = np.frombuffer(data, dtype, count, start).reshape(shape, order=order)
        image = as_tensor(_bands_first(array, axis))
    if len(shape) == 2 and _is_grey_for_colours(read):
        return image.expand(3, -1, -1).contiguous()  # (1, H, W) -> (3, H, W)
    return picked(image, read)


def _is_grey_for_colours(read: ReadSettings) -> bool:
    """Tell whether grey becomes three equal channels, as in files of other formats."""
    return read.in_chans == 3 and not read.channels


def npy_facts(data: bytes, read: ReadSettings) -> Facts:
    """Read the header of an array."""
    layout = _layout(_header_bytes(data), read)
    shape = layout.shape
    return Facts(_depth(layout.dtype), (*shape, 1)[layout.axis] if len(shape) == 3 else 1)


def is_npz(data: bytes | memoryview) -> bool:
    """Tell whether a file may be NumPy's archive of arrays."""
    return data[:4] == ZIP_MAGIC


def npy_in(data: bytes, max_bytes: int) -> tuple[bytes, int]:
    """Return the .npy file of the image in an archive, and how many arrays the archive holds.

    Raises many types of errors for damaged archives, and ValueError for an array of more than `max_bytes`.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        arrays = sum(name.endswith(".npy") for name in archive.namelist())
    # `_member` takes 8 bytes for a value.
    return _member(data, ReadSettings(in_chans=1, max_pixels=max_bytes // 8)), arrays


def decode_npz(data: bytes | memoryview, read: ReadSettings) -> torch.Tensor:
    """Decode the only array of an archive, or the one called `image` or `arr_0`."""
    return decode_npy(_member(data, read), read)


def npz_facts(data: bytes, read: ReadSettings) -> Facts:
    """Read the header of the array that `decode_npz` takes."""
    return npy_facts(_member(data, read, LONGEST_HEADER), read)


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """Copy an array to a tensor of one of the depths. Raises ValueError for values that none can hold."""
    # By its code: several types of C may have 8 bytes.
    native = np.dtype(array.dtype.newbyteorder("=").str)
    kept: Any = WIDENED.get(native.type, native.type)
    if kept not in KEPT:
        raise ValueError(f"its values are {array.dtype}, which are no pixels")
    if kept == np.float32 and native.kind in "iu" and array.size:
        largest = max(abs(int(array.min())), abs(int(array.max())))
        if largest > LARGEST_EXACT:
            raise ValueError(f"its integers reach {largest}: float32 is exact up to {LARGEST_EXACT}")
    # A copy in the order of its axes: the file's bytes cannot be written to.
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, which `decode` refuses
        return torch.from_numpy(np.array(array, dtype=kept, order="C"))


class Layout(NamedTuple):
    """Where the values of an array lie in its file.

    Attributes:
        axis: of the bands.
        start: of the values, in bytes.
        shared: the type of a tensor (C, H, W) in the file's own memory; None if there must be a copy.
    """

    shape: tuple[int, ...]
    order: Literal["C", "F"]
    dtype: np.dtype
    axis: int
    start: int
    shared: torch.dtype | None


def _header_bytes(data: bytes | memoryview) -> bytes:
    """Return the first bytes of a .npy file, up to its values."""
    width = 4  # bytes of the number that follows magic and version
    if data[6:7] == b"\x01":
        width = 2
    length = int.from_bytes(data[8 : 8 + width], "little")
    return bytes(data[: 8 + width + length])


# The files of a data set have few headers, and to parse one takes longer than to copy a small image.
@lru_cache(maxsize=1024)
def _layout(header: bytes, read: ReadSettings) -> Layout:
    """Read a header, and check that its array is an image."""
    file = io.BytesIO(header)
    shape, fortran_order, dtype = _header(file)
    axis = _check(shape, dtype, read)
    order: Literal["C", "F"] = "C"
    if fortran_order:
        order = "F"
    shared = None
    in_order = not fortran_order and (len(shape) == 2 or axis == 0)
    if in_order and dtype.isnative and dtype.type in KEPT and file.tell() % dtype.itemsize == 0:
        shared = _depth(dtype)
    return Layout(shape, order, dtype, axis, file.tell(), shared)


def _header(file: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    # Version 3 differs in the names of structured types only, which are no images.
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"version {version} of .npy")
    return readers[version](file)


def _depth(dtype: np.dtype) -> torch.dtype:
    return as_tensor(np.zeros(0, dtype)).dtype


def _check(shape: tuple[int, ...], dtype: np.dtype, read: ReadSettings) -> int:
    """Return the axis of the bands; raise ValueError for an array that is no image of the wanted bands."""
    wanted = read.stored_bands
    described = f"found {dtype} {shape}"
    expected = f"(H, W, {wanted or 'C'}) or ({wanted or 'C'}, H, W)"
    if dtype.hasobject or dtype.names is not None or len(shape) not in (2, 3) or min(shape) <= 0:
        raise ValueError(f"{described}, expected numbers {expected}")
    _depth(dtype)  # raises for types without pixels
    axis = 2
    if len(shape) == 2:
        if wanted not in (None, 1) and not _is_grey_for_colours(read):
            raise ValueError(f"{described}, which is one band, expected {expected}")
    else:
        axis = _band_axis(shape, read, f"{described}, expected {expected}")
    height, width = (side for i, side in enumerate(shape) if i != axis)
    check_pixels(height, width, read.max_pixels)
    return axis


def _band_axis(shape: tuple[int, ...], read: ReadSettings, problem: str) -> int:
    wanted = read.stored_bands
    if wanted is not None:
        axes = [i for i in (2, 0) if shape[i] == wanted]
    else:
        axes = [i for i in (2, 0) if shape[i] > max(read.channels)]
    if not axes:
        raise ValueError(problem)
    if len(axes) == 2:
        raise ValueError(
            f"{problem}: both orders fit its shape, so the bands are not known; store another size, or give "
            "the number of bands as `in_chans` beside `channels`"
        )
    return axes[0]


def _bands_first(array: np.ndarray, axis: int) -> np.ndarray:
    if array.ndim == 2:
        return array[None]  # (H, W) -> (1, H, W)
    return np.moveaxis(array, axis, 0)


def _member(data: bytes | memoryview, read: ReadSettings, most: int | None = None) -> bytes:
    """Return the .npy file in an archive that holds the image, unpacked; of it `most` bytes at most."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        arrays = [info for info in archive.infolist() if info.filename.endswith(".npy")]
        members = {info.filename.removesuffix(".npy"): info for info in arrays}
        if not members:
            raise ValueError("it holds no array")
        names = [*members]
        if len(names) > 1:
            names = [name for name in ("image", "arr_0") if name in members]
        if not names:
            raise ValueError(f"it holds {len(members)} arrays: call the image's `image`")
        info = members[names[0]]
        # What is claimed is allocated: 8 bytes for each value, and a header. Small files unpack to gigabytes.
        bands = max(1, read.stored_bands or 1 + max(read.channels))
        largest = 8 * read.max_pixels * bands + LONGEST_HEADER
        if info.file_size > largest:
            raise ValueError(f"its array claims {info.file_size} bytes, more than {largest}")
        # Python unpacks blocks of other kinds to any size before it cuts them. NumPy does not write these.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(
                f"its array is compressed by method {info.compress_type}: use np.savez_compressed"
            )
        with archive.open(info) as member:
            return member.read(min(info.file_size, most or info.file_size))
