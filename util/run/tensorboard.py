"""TensorBoard's files, which may fail without ending the run that they only report."""


class Board:
    """A SummaryWriter whose first OSError, of a full disk say, ends the writing with a note, and nothing else."""

    def __init__(self, log_dir: str):
        from torch.utils.tensorboard import SummaryWriter

        self.log_dir, self.writer = log_dir, SummaryWriter(log_dir)

    def scalar(self, name: str, value: float, x: int) -> None:
        self._try(lambda writer: writer.add_scalar(name, value, x))

    def image(self, name: str, image, x: int) -> None:
        """Show a (H, W, 3) uint8 picture."""
        self._try(lambda writer: writer.add_image(name, image, x, dataformats="HWC"))

    def flush(self) -> None:
        self._try(lambda writer: writer.flush())

    def _try(self, call) -> None:
        if self.writer is None:
            return
        try:
            call(self.writer)
        except OSError as e:  # of the writer's own thread, which ends with it
            self.writer = None
            print(
                f"warning: nothing more is written for TensorBoard to {self.log_dir}: {e}; training goes on",
                flush=True,
            )
