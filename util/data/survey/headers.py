"""What the headers of some images say: depth, orientation, pages and transparency."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from util.data.formats import Facts, ReadSettings, depth_name, describe, widest
from util.data.sources.image_index import Listed
from util.files.names import counted

LOOKED_AT = 64  # files, when a data set is opened
LOOKED_AT_BYTES = 1 << 28  # of them together: every rank reads them


@dataclass
class Survey:
    """What the headers of some files say.

    Attributes:
        images: how many were looked at.
        of: how many there are.
        depths: how many have each type of pixels.
        turned: how many have an EXIF orientation.
        paged: how many have more than one page.
        transparent: how many may have transparency.
    """

    images: int = 0
    of: int = 0
    depths: Counter[torch.dtype] = field(default_factory=Counter)
    turned: int = 0
    paged: int = 0
    transparent: int = 0

    def add(self, facts: Facts) -> None:
        """Count one image."""
        self.images += 1
        self.depths[facts.depth] += 1
        self.turned += facts.orientation != 1
        self.paged += facts.pages > 1
        self.transparent += facts.alpha

    @property
    def depth(self) -> torch.dtype:
        """Return the type of the data set's pixels: one that holds the pixels of all images looked at.

        If most images have 8 bits, it is uint8: no range fits both kinds, and a few images do not decide how
        all are read.
        """
        if 2 * self.depths[torch.uint8] > self.images:
            return torch.uint8
        return widest(set(self.depths))

    def summary(self, read: ReadSettings) -> str:
        """Say what is not usual, and what becomes of it: "; of 64 images looked at: 3 uint16"."""
        found = []
        if set(self.depths) - {torch.uint8}:
            kinds = [f"{n} {depth_name(depth)}" for depth, n in self.depths.most_common()]
            found.append(", ".join(kinds))
            if self.depth == torch.uint8:
                found[-1] += " (unreadable among 8-bit images: convert them)"
            elif len(self.depths) > 1:
                found[-1] += " (one range for all: 8-bit images are dark in that of deeper ones)"
        if self.turned:
            done = {"apply": "applied", "ignore": "ignored"}[read.exif]
            found.append(f"{self.turned} with an EXIF orientation ({done})")
        if self.paged:
            found.append(f"{self.paged} with several pages (the first is read)")
        if self.transparent and read.in_chans in (1, 3):
            done = {"drop": "dropped: colours under it are seen"}.get(
                read.transparency, f"on {read.transparency}"
            )
            found.append(f"{self.transparent} with transparency ({done})")
        if not found:
            return ""
        looked = f"of {counted(self.images, 'image')} looked at"
        if self.images == self.of:
            looked = "among them"
        return f"; {looked}: {', '.join(found)}"


def survey(index: Listed, read: ReadSettings, most: int = LOOKED_AT) -> Survey:
    """Look at the headers of up to `most` images, evenly spread. Unreadable files are passed over.

    Files are read as a whole. Of large ones fewer are looked at.
    """
    found = Survey(of=len(index))
    size = 0
    for data in some_files(index, most):
        # A header that cannot be read is reported when the image is.
        with contextlib.suppress(ValueError):
            found.add(describe(data, read))
        size += len(data)
        if size > LOOKED_AT_BYTES:
            break
    return found


def spread(n: int, most: int) -> list[int]:
    """Return up to `most` numbers below n, at equal distances."""
    return sorted({k * n // most for k in range(most)})


def some_files(index: Listed, most: int) -> Iterator[bytes]:
    """Yield the bytes of up to `most` images, evenly spread; files that cannot be read are passed over."""
    for i in spread(len(index), most):
        try:
            yield index.read(i)
        except OSError:
            index.check_unchanged(i)
