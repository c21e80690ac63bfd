"""Which images a run trains on: what its checkpoints store, and what a continued run finds."""

import os
from dataclasses import asdict, dataclass
from typing import Any

from util.files.names import counted, printable
from util.weights.types import Checkpoint

ENTRY = "training_images"  # of a checkpoint
LONGEST_PATH = 4096  # characters; Linux has no longer ones


@dataclass(frozen=True)
class TrainingImages:
    """The images of a run.

    `path` is what the user named. `images` is their number, or None for a stream. `digest` is a hash of their
    names, order and labels, or '' for timm's readers, which have no list of them.
    """

    path: str
    images: int | None
    digest: str

    @classmethod
    def of(cls, dataset: Any) -> "TrainingImages | None":
        """Describe a data set; None for one that has neither a list of images nor a name."""
        index: Any = getattr(dataset, "index", None)
        if hasattr(index, "path") and hasattr(index, "digest"):
            return cls(index.path, len(index), index.digest())
        path = getattr(dataset, "path", "")
        if not path:
            return None
        # The length of a stream depends on the number of ranks.
        images = None
        if dataset.exact_resume:
            images = len(dataset)
        return cls(path, images, "")

    @classmethod
    def stored_in(cls, start: Checkpoint) -> "TrainingImages | None":
        """Return what a checkpoint stores; None if it is of an older version or of another program."""
        stored = start.entries.get(ENTRY)
        if not isinstance(stored, dict):
            return None
        path = stored.get("path")
        images = stored.get("images")
        digest = stored.get("digest")
        if type(path) is not str or len(path) > LONGEST_PATH or type(digest) is not str:
            return None
        if images is not None and (type(images) is not int or not 0 <= images < 2**63):
            return None
        return cls(path, images, digest)

    def to_dict(self) -> dict[str, Any]:
        """Return the plain values that a checkpoint stores."""
        return asdict(self)

    def are(self, other: "TrainingImages") -> bool:
        """Whether these are the same images, maybe at another path, as far as that is known."""
        if self.digest or other.digest:
            return self.digest == other.digest
        return self._reader == other._reader and self.images == other.images

    @property
    def _reader(self) -> str:
        """The name for timm without the folder, which may be another one on each node."""
        return self.path.partition("=")[0]

    def __str__(self) -> str:
        if self.images is None:
            return f"the stream {printable(self.path)}"
        return f"{counted(self.images, 'image')} of {printable(self.path)}"


def compare(start: Checkpoint, now: TrainingImages | None, allowed: bool) -> str:
    """Return a note on the images of a continued run, '' if they are the same at the same path.

    Raises ValueError if they are others than those that `start` was trained on, unless that is `allowed`.
    """
    if now is None:
        return ""
    before = TrainingImages.stored_in(start)
    if before is None:
        return (
            f"{start.path} does not say which images it was trained on, so they cannot be compared with {now}"
        )
    if before.are(now):
        return _note_of_path(before, now)
    found = f"training images changed: {before} before, {now} now"
    if (before.images, before.path) == (now.images, now.path):
        found += ", with other names or labels"
    if allowed:
        return (
            f"warning: {found}; the run continues at its step with the new images and their order, so it "
            "cannot be repeated from its beginning"
        )
    raise ValueError(
        f"{found}: restore the images that {start.path} was trained on, continue with the new ones by "
        "`allow_other_data`, or start a new run in another `output_dir` without `resume`"
    )


def _note_of_path(before: TrainingImages, now: TrainingImages) -> str:
    if os.path.realpath(before.path) == os.path.realpath(now.path):
        return ""
    if now.digest:
        return f"the training images are the same, now in {printable(now.path)}"
    return f"the training images are now {now}, before they were {before}: only name and number were compared"
