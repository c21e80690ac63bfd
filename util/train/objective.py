"""The contract between a main and the engine."""

from collections.abc import Callable

from torch import Tensor, nn

from util.train.state import TrainState

# (model, batch) -> the scalar loss and its named terms.
LossFunction = Callable[[nn.Module, dict], tuple[Tensor, dict[str, Tensor]]]


class Objective:
    """What a run minimises, and what happens around its updates.

    Only `loss` must be written. What the loss reads and the hooks change (a teacher's momentum, a
    temperature) are attributes of the objective.
    """

    def loss(self, model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar loss of a batch and its named terms.

        Terms are scalar tensors. They are averaged over batches and ranks, printed, logged and plotted.
        """
        raise NotImplementedError

    def before_update(self, done: float) -> None:
        """Set schedules; `done` is the number of epochs done so far, fractional within an epoch."""

    def before_step(self) -> None:
        """Change gradients after they are complete, unscaled and clipped."""

    def after_step(self, step: int) -> None:
        """Update what follows the model (a teacher, an average) after step number `step`, counted from 0."""

    def after_epoch(self, epoch: int, state: TrainState) -> dict[str, float]:
        """Evaluate; return figures for the epoch's line of log.txt. `state.best` may be set here."""
        return {}

    def state(self) -> dict[str, nn.Module]:
        """Return modules that are saved and resumed in addition to the model, by their names."""
        return {}
