"""TensorBoard files. A failure to write them does not end the run that they report."""

from collections.abc import Callable


class Board:
    """A SummaryWriter that stops writing, with a note, at its first OSError (a full disk, for example)."""

    def __init__(self, log_dir: str):
        # A slow import that only rank 0 of a logged run needs.
        from torch.utils.tensorboard import SummaryWriter

        self.log_dir = log_dir
        self.writer: SummaryWriter | None = SummaryWriter(log_dir)

    def scalar(self, name: str, value: float, x: int) -> None:
        self._try(lambda writer: writer.add_scalar(name, value, x))

    def image(self, name: str, image, x: int) -> None:
        """Show a picture (H, W, 3) uint8."""
        self._try(lambda writer: writer.add_image(name, image, x, dataformats="HWC"))

    def flush(self) -> None:
        self._try(lambda writer: writer.flush())

    def _try(self, call: Callable) -> None:
        if self.writer is None:
            return
        try:
            call(self.writer)
        except OSError as error:
            # The error comes from the writer's own thread, which ends with it: later calls
            # would write nothing.
            self.writer = None
            note = f"no more TensorBoard files are written to {self.log_dir}"
            print(f"warning: {note}: {error}; training continues", flush=True)
