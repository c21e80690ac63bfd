"""The label heads of a model, composed of the kinds that `pos_label` names.

Shapes: B batch, n tokens given (all of the grid, or the visible ones), D width, h w the grid, L = h*w cells.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layers.contract import Labels
from layers.positional import KINDS, label_names
from layers.positional.draws import Draws
from layers.positional.kind import LabelKind


def load_kinds() -> dict[str, type[LabelKind]]:
    """Import every file of `kinds/` and collect its classes by their names."""
    found = {}
    for path in sorted(KINDS.glob("[!_]*.py")):
        module = importlib.import_module(f"{__package__}.kinds.{path.stem}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, LabelKind) and "name" in vars(value):
                found[value.name] = value
    return {name: found[name] for name in label_names()}


LABELS = load_kinds()


class PositionalHead(nn.Module):
    """The label heads of a model. With several kinds, their losses are added.

    `head(tokens, ids)` takes patch tokens after the final norm (B, n, D) and their cells (B, n), by default
    all cells in order, and returns {name: scalar}: `position`, `position_acc`, and with several kinds also
    the parts `apl`, `apl_acc`, `rpl`, `rpl_acc`, ...

    Raises ValueError if a kind or `pos_tokens` is unknown, and if `dim` is not a multiple of 4.
    """

    def __init__(self, dim: int, grid: tuple[int, int], options: Labels):
        super().__init__()
        kinds = options.pos_label.split("+")
        if not set(kinds) <= LABELS.keys() or len(set(kinds)) < len(kinds):
            raise ValueError(
                f"`pos_label` takes none, or kinds joined by + ({', '.join(LABELS)}), found "
                f"{options.pos_label!r}"
            )
        if options.pos_tokens not in ("half", "full"):
            raise ValueError(f"`pos_tokens` takes half or full, found {options.pos_tokens!r}")
        if dim % 4:
            raise ValueError(f"positional labels need a token width that is a multiple of 4, found {dim}")
        self.grid = grid
        # In the order of LABELS, not in that of `pos_label`: random initialisation depends on the order.
        for name, kind in LABELS.items():
            if name in kinds:
                self.add_module(name, kind(dim, grid, options))
        self.apply(_init_head)

    @property
    def kinds(self) -> dict[str, LabelKind]:
        """The kinds of this head by name."""
        return {name: part for name, part in self.named_children() if isinstance(part, LabelKind)}

    @property
    def absolute(self) -> LabelKind | None:
        """The first kind whose logits are about cells, for pictures of predicted cells; or None."""
        return next((kind for kind in self.kinds.values() if kind.of_cells), None)

    @property
    def changes_input(self) -> bool:
        """Whether a kind changes the tokens that the encoder reads."""
        return any(type(kind).before is not LabelKind.before for kind in self.kinds.values())

    def before(self, tokens: Tensor, ids_keep: Tensor, draws: Draws | None = None) -> Tensor:
        """Embedded visible patches (B, n, D), their cells (B, n) -> tokens that the encoder reads."""
        for kind in self.kinds.values():
            tokens = kind.before(tokens, ids_keep, draws)
        return tokens

    def forward(
        self, tokens: Tensor, ids: Tensor | None = None, draws: Draws | None = None
    ) -> dict[str, Tensor]:
        """(B, n, D), cells (B, n) -> losses and accuracies by name.

        Raises ValueError if tokens and cells differ in number.
        """
        if ids is None:
            ids = torch.arange(self.grid[0] * self.grid[1], device=tokens.device).expand(tokens.shape[0], -1)
        if tokens.shape[:2] != ids.shape:
            raise ValueError(
                f"tokens {tuple(tokens.shape)} and cells {tuple(ids.shape)} do not belong together"
            )
        return _combine({name: kind.loss(tokens, ids, draws) for name, kind in self.kinds.items()})

    def chance(self, num_tokens: int) -> dict[str, float]:
        """Chance levels for `num_tokens` random cells, by the names that `forward` returns."""
        return _combine({name: kind.chance(num_tokens) for name, kind in self.kinds.items()})


def _combine(parts: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """{kind: (loss, accuracy)} -> the summed loss and the mean accuracy, then the parts if there are
    several."""
    losses, accs = zip(*parts.values())
    out = {"position": sum(losses), "position_acc": sum(accs) / len(accs)}
    if len(parts) > 1:
        for kind, (loss, acc) in parts.items():
            out |= {kind: loss, f"{kind}_acc": acc}
    return out


def _init_head(module: nn.Module) -> None:
    """Truncated normal 0.02 and zero biases, as in the authors' Swin and the paper's reference code."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
