"""TensorBoard files. A failure to write them does not end the run that they report."""

import glob
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Board:
    """A SummaryWriter that stops writing, with a note, at its first OSError (a full disk, for example).

    If the folder has files of earlier starts, TensorBoard hides what they have at the points from `purged`
    on: the run writes these points again. If the file is removed with its folder, a new one is begun.
    """

    def __init__(self, log_dir: str, purged: int = 0):
        self.log_dir = log_dir
        self.writer: SummaryWriter | None = None
        self._path: str | None = None
        try:
            self._begin_file(purged)
        except OSError as error:
            self._give_up(error)

    def scalar(self, name: str, value: float, x: int) -> None:
        self._try(lambda writer: writer.add_scalar(name, value, x))

    def image(self, name: str, image, x: int) -> None:
        """Show a picture (H, W, 3) uint8."""
        self._try(lambda writer: writer.add_image(name, image, x, dataformats="HWC"))

    def flush(self) -> None:
        self._try(lambda writer: writer.flush())

    def _begin_file(self, purged: int | None = None) -> None:
        # A slow import that only rank 0 of a logged run needs.
        from torch.utils.tensorboard import SummaryWriter

        earlier = self._files()
        if not earlier:
            purged = None
        self.writer = SummaryWriter(self.log_dir, purge_step=purged)
        mine = [path for path in self._files() - earlier if f".{os.getpid()}." in path]
        # A folder in a cloud has no files that can be looked for.
        self._path = next(iter(mine), None)

    def _files(self) -> set[str]:
        return set(glob.glob(os.path.join(glob.escape(self.log_dir), "events.out.tfevents.*")))

    def _try(self, call: Callable) -> None:
        if self.writer is None:
            return
        try:
            if self._path is not None and not os.path.exists(self._path):
                print(f"warning: {self._path} was removed: TensorBoard gets a new file", flush=True)
                self._begin_file()
            call(self.writer)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        # The error comes from the writer's own thread, which ends with it: later calls
        # would write nothing.
        self.writer = None
        note = f"no more TensorBoard files are written to {self.log_dir}"
        print(f"warning: {note}: {error}; training continues", flush=True)
