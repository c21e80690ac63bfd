"""The path of a data set together with the settings that say how it is laid out."""

import argparse
import os
from dataclasses import dataclass

VAL_SPLIT = "val"  # the usual name of the validation images


@dataclass(frozen=True)
class DataPath(os.PathLike):
    """The path of a data set, and what its folders mean. It serves wherever a path of images is taken.

    Attributes:
        path: of a folder, a tar or a list; "" for the demo set.
        val_split: name of the validation images, as in `<path>/<val_split>/`.
        val_share: share of the training images of each class that is held out for validation; 0 for none.
        class_depth: how many folders make up the name of a class; None for one, if nothing speaks against it.
        data_cache: folder for copies of tars in an object store; "" for the user's cache.

    Raises ValueError for values that make no sense, or not together.
    """

    path: str = ""
    val_split: str = VAL_SPLIT
    val_share: float = 0.0
    class_depth: int | None = None
    data_cache: str = ""

    def __post_init__(self) -> None:
        name = self.val_split
        if not name or "/" in name or name.startswith(".") or name == "train":
            raise ValueError(f"`val_split` takes the name of a folder beside train/, found {name!r}")
        if not 0 <= self.val_share < 1:
            raise ValueError(f"`val_share` must be at least 0 and less than 1, found {self.val_share}")
        if self.class_depth is not None and self.class_depth < 1:
            raise ValueError(f"`class_depth` must be 1 or more, found {self.class_depth}")

    def __fspath__(self) -> str:
        return self.path

    def __str__(self) -> str:
        return self.path

    def __bool__(self) -> bool:
        return bool(self.path)

    @property
    def depth(self) -> int:
        """How many folders make up the name of a class."""
        return self.class_depth or 1

    @classmethod
    def of(cls, path: "str | os.PathLike") -> "DataPath":
        """Return the path itself, or a plain path with the usual settings."""
        if isinstance(path, cls):
            return path
        return cls(os.fspath(path))

    @classmethod
    def from_flags(cls, flags: argparse.Namespace) -> "DataPath":
        """Return the path that the flags of `add_data_flags` describe."""
        return cls(flags.data_path, flags.val_split, flags.val_share, flags.class_depth, flags.data_cache)
