"""Shuffled labels: permutations that depend on a key alone; chance loss where APL learns."""

import math

import pytest
import torch

import main_pretrain
import tiny  # noqa: F401 (registers mae_test)
from layers.contract import Labels
from layers.positional.draws import Draws, draws_of, permutations, sample_noise
from layers.positional.head import LABELS, PositionalHead
from models_mae_pl import MODELS, random_masking
from util.data.loading.samplers import sample_seed
from util.evaluate.supervised import make_eval_fn

GRID = (3, 4)
CELLS = torch.arange(12)


def draws_at(epoch: int, indices: list[int], seed: int = 0) -> Draws:
    keys = [sample_seed(seed, epoch, i) for i in indices]
    return Draws(torch.tensor(keys), torch.tensor(indices))


def head_of(kind: str, seed: int = 0) -> PositionalHead:
    torch.manual_seed(0)
    return PositionalHead(16, GRID, Labels(kind, seed=seed))


def targets(kind: str, draws: Draws, seed: int = 0) -> torch.Tensor:
    part = head_of(kind, seed).kinds[kind]
    return part.targets(CELLS.expand(len(draws.image), -1), draws)


@pytest.mark.parametrize("kind", ["shuffled", "shuffled_fixed"])
def test_targets_are_permutations_that_depend_on_the_image_alone(kind):
    alone = targets(kind, draws_at(3, [7]))
    together = targets(kind, draws_at(3, [2, 5, 7, 11]))
    assert torch.equal(alone[0], together[2]), "the same in any batch, and so on any rank"
    assert torch.equal(together.sort(dim=1).values, CELLS.expand(4, -1))
    assert len({tuple(row) for row in together.tolist()}) == 4, "images draw their own"
    # Of visible cells only: the labels are those of the cells, in any order.
    ids = torch.tensor([[9, 0, 4]])
    part = head_of(kind).kinds[kind]
    assert torch.equal(part.targets(ids, draws_at(3, [7])), alone[:, ids[0]])
    assert not torch.equal(targets(kind, draws_at(3, [7], seed=1), seed=1), alone), "another seed"


def test_only_shuffled_changes_with_the_epoch():
    first, second = draws_at(0, [0, 1, 2]), draws_at(1, [0, 1, 2])
    assert (targets("shuffled", first) != targets("shuffled", second)).any(dim=1).all()
    assert torch.equal(targets("shuffled_fixed", first), targets("shuffled_fixed", second))


def test_every_cell_gets_every_label_equally_often():
    draws = draws_at(0, list(range(6000)))
    for kind in ("shuffled", "shuffled_fixed"):
        labels = targets(kind, draws)
        counts = torch.stack([torch.bincount(labels[:, cell], minlength=12) for cell in range(12)])
        assert ((counts - 500).abs() < 5 * math.sqrt(500)).all(), kind


def test_labels_are_independent_of_the_mask_of_the_same_key():
    """The mask is drawn from the key as well: its first cell must not know its label."""
    draws = draws_at(0, list(range(6000)))
    visible = random_masking(sample_noise(draws.key, 12), 0.75)
    part = head_of("shuffled").kinds["shuffled"]
    for column in part.targets(visible, draws).T:
        counts = torch.bincount(column, minlength=12)
        assert ((counts - 500).abs() < 5 * math.sqrt(500)).all()
    # With the mask's own key, the labels of the visible cells would follow from the mask.
    assert not torch.equal(permutations(draws.key, 12), targets("shuffled", draws))


@pytest.mark.parametrize("kind", ["shuffled", "shuffled_fixed"])
def test_a_constant_prediction_has_the_loss_of_chance(kind):
    head = head_of(kind)
    for p in head.parameters():
        torch.nn.init.zeros_(p)
    out = head(torch.randn(3, 12, 16), draws=draws_at(0, [0, 1, 2]))
    assert out["position"].item() == pytest.approx(math.log(12), abs=1e-6)
    assert head.chance(12) == {"position": pytest.approx(math.log(12)), "position_acc": 1 / 12}
    names = {name for name, _ in head.named_parameters()}
    assert all(name.startswith(f"{kind}.") for name in names)
    with pytest.raises(ValueError, match="`draws`"):
        head(torch.randn(3, 12, 16))


def position_loss_after_training(kind: str, epochs: int = 60) -> float:
    """Mean position loss of the last ten epochs, on images whose cells differ in brightness."""
    torch.manual_seed(0)
    options = dict(img_size=(32, 32), pos_embed="sincos", pos_label=kind, decoder_depth=0)
    model = MODELS["mae_test"](**options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    images = torch.randn(64, 3, 32, 32)
    losses = []
    for epoch in range(epochs):
        draws = draws_at(epoch, list(range(64)))
        ids_keep = random_masking(sample_noise(draws.key, 16), 0.5)
        loss = model(images, ids_keep=ids_keep, want_pred=False, draws=draws)[0]["position"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


@pytest.mark.slow  # trains for 120 epochs
def test_apl_learns_where_shuffled_stays_at_chance():
    """With a positional embedding in the encoder APL is easy; labels that name no place cannot be learned."""
    assert position_loss_after_training("apl") < 2.0
    assert position_loss_after_training("shuffled") == pytest.approx(math.log(16), abs=0.01)


def test_evaluation_hands_the_draws_to_the_labels():
    seen = {}

    def model(images, positions, draws):
        seen["draws"] = draws
        return torch.zeros(2, 5), {}

    batch = {"image": torch.zeros(2, 3, 8, 8), "label": torch.tensor([0, 1])}
    batch |= {"key": torch.tensor([5, 6]), "index": torch.tensor([0, 1])}
    make_eval_fn(positions=True)(model, batch)
    assert torch.equal(seen["draws"].key, batch["key"]) and torch.equal(seen["draws"].image, batch["index"])
    assert draws_of({"image": batch["image"]}) is None


def test_the_choices_of_command_lines_are_the_kinds():
    text = main_pretrain.get_args_parser().format_help()
    assert all(name in text for name in LABELS)
