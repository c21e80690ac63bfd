"""What tokens know about their position: closed forms against scikit-learn and numpy, and its removal."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import r2_score

from util.evaluate import position
from util.evaluate.position import CellStatistics, PositionProjection

GRID = (3, 4)
CELLS = 12


def image_tokens(n, channels=20, grid=GRID, seed=0):
    """Tokens without position information: noise, and what all tokens of an image share."""
    draw = torch.Generator().manual_seed(seed)
    shared = 2 * torch.randn(n, 1, channels, generator=draw)
    return shared + torch.randn(n, grid[0] * grid[1], channels, generator=draw) + 3


def statistics_of(tokens) -> CellStatistics:
    found = CellStatistics(*tokens.shape[1:])
    for batch in tokens.split(7):
        found.add(batch)
    return found


def halves(tokens):
    """The images that are not held out, and the others."""
    held = torch.tensor([position.is_held_out(i) for i in range(len(tokens))])
    return tokens[~held], tokens[held]


def audited(tokens, grid=GRID):
    """The figures of tokens (n, L, C), which stand for images and for their only layer."""
    train, held_out = halves(tokens)
    found = position.audit(lambda x: [x], train.split(16), held_out.split(16), grid)
    assert (found.images, found.held_out) == (len(train), len(held_out))
    return found.layers[0]


def halves_flat(tokens):
    return [part.flatten(0, 1).double().numpy() for part in halves(tokens)]


def linear_positions(n=80, noise=0.0, channels=20):
    """Tokens in which the cell is a direction of its own, on orthogonal directions, beside noise."""
    draw = torch.Generator().manual_seed(3)
    directions = torch.linalg.qr(torch.randn(channels, channels, generator=draw)).Q[:CELLS]
    return 5 * directions + noise * torch.randn(n, CELLS, channels, generator=draw)


# --- oracles


def test_figures_are_those_of_scikit_learn():
    tokens = image_tokens(60)
    tokens[..., 2] += 2 * (torch.arange(CELLS) // 4)
    tokens[..., 5] += 1.5 * (torch.arange(CELLS) % 4)
    found = audited(tokens)
    train, held_out = halves_flat(tokens)
    strength = 1e-3 * len(train) * train.var(0).mean()
    n_train, n_held = len(train) // CELLS, len(held_out) // CELLS
    cells = np.tile(np.arange(CELLS), n_train)
    expected = np.tile(np.arange(CELLS), n_held)
    for name, of in (("row_r2", lambda c: c // 4), ("column_r2", lambda c: c % 4)):
        theirs = Ridge(alpha=strength).fit(train, of(cells)).predict(held_out)
        assert getattr(found, name) == pytest.approx(r2_score(of(expected), theirs), abs=1e-9)
    one_hot = Ridge(alpha=strength).fit(train, np.eye(CELLS)[cells]).predict(held_out)
    assert found.cell_accuracy == pytest.approx(100 * (one_hot.argmax(1) == expected).mean(), abs=1e-9)
    assert 0 < found.row_r2 < 0.9 and found.cell_accuracy > 100 / CELLS


def test_weights_are_those_of_scikit_learn():
    tokens = image_tokens(9)
    targets = torch.randn(CELLS, 3, generator=torch.Generator().manual_seed(1))
    weight, bias = position.ridge(statistics_of(tokens), targets)
    x = tokens.flatten(0, 1).double().numpy()
    centred = x - x.mean(0)
    model = Ridge(alpha=1e-3 * np.mean(np.sum(centred**2, 0)))
    model.fit(x, np.tile(targets.double().numpy(), (9, 1)))
    np.testing.assert_allclose(weight.T, model.coef_, atol=1e-9)
    np.testing.assert_allclose(bias, model.intercept_, atol=1e-9)


def slow_between(x):
    """The corrected covariance of cell means of x (n, L, C), image by image."""
    n, cells, _ = x.shape
    relative = x - x.mean(1, keepdims=True)
    means = relative.mean(0)
    total = 0
    for cell in range(cells):
        # The variance of a mean of n independent images is a n-th of theirs.
        total = total + np.outer(means[cell], means[cell]) - np.cov(relative[:, cell].T) / n
    return total / cells


def test_between_cell_covariance_is_that_of_numpy():
    x = image_tokens(11)
    x[..., 0] += torch.arange(CELLS)
    expected = slow_between(x.double().numpy())
    found = statistics_of(x)
    np.testing.assert_allclose(found.between(), expected, atol=1e-9)
    within = np.mean([np.cov(x[:, cell].double().numpy().T).trace() for cell in range(CELLS)])
    share = expected.trace() / (expected.trace() + within)
    assert found.explained() == pytest.approx(share, abs=1e-12) and share > 0.1
    assert found.rank() == 1


def test_repeated_measures_are_those_of_an_f_test():
    """One channel: F of the two-way table is 1 + n * between / error, by the textbook's sums of squares."""
    x = image_tokens(9, channels=1)
    x[..., 0] += 0.2 * torch.arange(CELLS)
    y = x[..., 0].double().numpy()
    n = len(y)
    cells, rows, mean = y.mean(0), y.mean(1), y.mean()
    between = n * ((cells - mean) ** 2).sum() / (CELLS - 1)
    error = ((y - cells - rows[:, None] + mean) ** 2).sum() / ((CELLS - 1) * (n - 1))
    found = float(statistics_of(x).between())
    assert found == pytest.approx((between - error) / n * (CELLS - 1) / CELLS, abs=1e-9)


def test_batches_do_not_matter():
    x = image_tokens(9).double()
    whole, single = statistics_of(x), CellStatistics(*x.shape[1:])
    for image in x:
        single.add(image[None])
    assert whole.counts == single.counts == [5, 4]
    for ours, theirs in zip(single.halves, (x[::2].sum(0), x[1::2].sum(0))):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
    np.testing.assert_allclose(whole.halves, single.halves, atol=1e-12)
    np.testing.assert_allclose(whole.between(), single.between(), atol=1e-12)


def test_cell_means_of_noise_vary_like_those_of_images():
    """Over many draws of few images, whose true cell means differ a lot."""
    spreads = []
    for seed in range(300):
        x = image_tokens(7, channels=2, seed=seed)
        x += 100 * torch.arange(CELLS)[:, None]
        spreads.append(statistics_of(x).noise_means().square().sum(0) / (CELLS - 1))
    # Noise of variance 1 and seven images.
    np.testing.assert_allclose(torch.stack(spreads).mean(0), [1 / 7] * 2, rtol=0.06)


# --- known answers


def test_a_linear_position_is_read_completely():
    found = audited(linear_positions())
    assert found.row_r2 == pytest.approx(1, abs=1e-2) and found.column_r2 == pytest.approx(1, abs=1e-2)
    assert found.cell_accuracy == 100 and found.explained == pytest.approx(1, abs=1e-9)
    # Twelve directions of the same length around their mean.
    assert found.rank == CELLS - 1


def test_explained_is_the_constructed_share():
    """Cell directions of variance 25 / 20 * (1 - 1 / 12) a channel against noise of variance 4."""
    found = audited(linear_positions(n=400, noise=2.0))
    between = 25 / 20 * (1 - 1 / CELLS)
    assert found.explained == pytest.approx(between / (between + 4), rel=0.03)


@pytest.mark.parametrize("n", [8, 200])
def test_tokens_without_position_have_none(n):
    """Also with few images, whose observed cell means differ by noise."""
    shares = [statistics_of(image_tokens(n, seed=seed)).explained() for seed in range(20)]
    tokens = image_tokens(n)
    naive = float(statistics_of(tokens).spread().trace() / tokens.flatten(0, 1).double().var(0).sum())
    assert abs(np.mean(shares)) < 0.2 * naive
    found = audited(image_tokens(400))
    assert abs(found.row_r2) < 0.03 and abs(found.column_r2) < 0.03 and abs(found.explained) < 0.002
    assert found.cell_accuracy == pytest.approx(100 / CELLS, abs=4)


def test_two_directions_are_coordinates_but_no_cells():
    """Linear coordinates alone: R^2 is 1, and cells inside the grid are never the largest output."""
    tokens = torch.randn(40, 25, 6, generator=torch.Generator().manual_seed(0)) * 0.01
    tokens[..., :2] += position.coordinates((5, 5)).float()
    found = audited(tokens, (5, 5))
    assert found.row_r2 > 0.99 and found.column_r2 > 0.99 and found.rank == 2
    assert found.cell_accuracy < 50


def test_edges():
    constant = audited(torch.full((8, CELLS, 5), 2.5))
    assert constant.explained == 0 and constant.rank == 0 and constant.row_r2 == 0
    assert constant.cell_accuracy == pytest.approx(100 / CELLS)
    one_row = audited(image_tokens(16), (1, CELLS))
    assert math.isnan(one_row.row_r2) and not math.isnan(one_row.column_r2)
    for tokens, message in (
        (image_tokens(3), "every 4th image"),
        (image_tokens(1), "at least 2 images"),
        (image_tokens(8).log(), "layer 0 are not finite"),
        (image_tokens(8, grid=(2, 2)), "4 tokens for an image, and the grid 3x4 has 12"),
    ):
        with pytest.raises(ValueError, match=message):
            audited(tokens)
    with pytest.raises(ValueError, match=r"meet statistics of \(L, C\) \(12, 20\)"):
        statistics_of(image_tokens(4)).add(image_tokens(4, channels=3))


def test_scale_and_number_of_images_do_not_matter():
    tokens = image_tokens(40)
    tokens[..., 2] += torch.arange(CELLS)
    plain, scaled = audited(tokens), audited(tokens.double() * 1000)
    for name in ("row_r2", "column_r2", "cell_accuracy", "explained", "rank"):
        assert getattr(plain, name) == pytest.approx(getattr(scaled, name), abs=1e-8)
    weight, _ = position.ridge(statistics_of(tokens), torch.eye(CELLS))
    twice, _ = position.ridge(statistics_of(torch.cat([tokens, tokens])), torch.eye(CELLS))
    assert torch.allclose(weight, twice, atol=1e-12)


# --- removal


def with_content(n=600, position_size=1.0, seed=5):
    """Tokens that hold a content, which does not depend on the cell, and the position."""
    draw = torch.Generator().manual_seed(seed)
    content = torch.randn(n, CELLS, generator=draw)
    directions = torch.randn(3, 24, generator=draw)
    cells = position.coordinates(GRID).float()
    tokens = image_tokens(n, 24) + 4 * content[..., None] * directions[0]
    return tokens + position_size * cells @ directions[1:], content


def content_r2(tokens, content):
    train, held_out = halves_flat(tokens)
    y_train, y_held = halves_flat(content[..., None])
    return r2_score(y_held, LinearRegression().fit(train, y_train).predict(held_out))


def test_removed_positions_are_gone_and_content_stays():
    tokens, content = with_content(n=2400)
    before = audited(tokens)
    projection = PositionProjection.fit(statistics_of(halves(tokens)[0]))
    assert projection.basis.shape == (24, 2), "rows and columns"
    assert torch.allclose(projection.basis.t() @ projection.basis, torch.eye(2).double(), atol=1e-10)
    removed = projection.remove(tokens)
    after = audited(removed)
    assert before.row_r2 > 0.5 and before.column_r2 > 0.5 and before.cell_accuracy > 25
    assert after.row_r2 < 0.01 and after.column_r2 < 0.01
    assert after.cell_accuracy == pytest.approx(100 / CELLS, abs=2.5)
    # A fresh reader without any penalty, on held-out images.
    train, held_out = halves_flat(removed)
    rows = np.arange(CELLS) // 4
    fresh = LinearRegression().fit(train, np.tile(rows, len(train) // CELLS))
    assert r2_score(np.tile(rows, len(held_out) // CELLS), fresh.predict(held_out)) < 0.01
    assert content_r2(tokens, content) > 0.97 and content_r2(removed, content) > 0.97
    assert torch.allclose(removed.mean((0, 1)), tokens.mean((0, 1)), atol=0.1)
    assert torch.allclose(projection.remove(removed), removed, atol=1e-4)


def test_a_share_removes_the_largest_directions():
    tokens, _ = with_content()
    tokens[..., 0] += 30 * (torch.arange(CELLS) % 2)
    statistics = statistics_of(tokens)
    assert [PositionProjection.fit(statistics, share).basis.shape[1] for share in (0.5, 1.0)] == [1, 3]
    removed = audited(PositionProjection.fit(statistics, 0.5).remove(tokens))
    # Only the parity of the column is gone.
    assert removed.row_r2 > 0.5
    assert audited(PositionProjection.fit(statistics).remove(tokens)).row_r2 < 0.01


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_removed_from_tokens_without_position(seed):
    """Their observed cell means differ, most of all along the content."""
    tokens, content = with_content(position_size=0.0, seed=seed)
    statistics = statistics_of(tokens)
    largest = torch.linalg.eigh(statistics.spread()).eigenvectors[:, -1:]
    naive = PositionProjection(statistics.mean(), largest).remove(tokens)
    assert content_r2(tokens, content) > 0.97 and content_r2(naive, content) < 0.9
    kept = PositionProjection.fit(statistics).remove(tokens)
    assert content_r2(kept, content) > content_r2(tokens, content) - 0.02


def test_smooth_content_is_not_taken_for_position():
    """Neighbouring cells of an image look alike, so that the noise of their means is alike, too."""
    draw = torch.Generator().manual_seed(2)
    smooth = torch.randn(200, 24, 2, 2, generator=draw)
    tokens = torch.nn.functional.interpolate(smooth, (6, 6), mode="bilinear").flatten(2).transpose(1, 2)
    tokens += 0.1 * torch.randn(tokens.shape, generator=draw)
    assert PositionProjection.fit(statistics_of(tokens)).basis.shape[1] == 0
    tokens[..., 7] += 0.5 * (torch.arange(36) // 6)
    projection = PositionProjection.fit(statistics_of(tokens))
    assert projection.basis.shape[1] == 1 and projection.basis[7].abs() > 0.95


def test_removals_that_are_refused():
    full = linear_positions(n=20, noise=0.1)[..., :6]
    with pytest.raises(ValueError, match=r"differ in all 6 channels.*smaller `share`"):
        PositionProjection.fit(statistics_of(full))
    assert PositionProjection.fit(statistics_of(full), share=0.5).basis.shape[1] < 6
    for share in (0, 1.1, math.nan):
        with pytest.raises(ValueError, match="`share` must lie in"):
            PositionProjection.fit(statistics_of(full), share)
    with pytest.raises(ValueError, match="40 channels need at least 5 images of this grid, found 4"):
        PositionProjection.fit(statistics_of(image_tokens(4, channels=40)))
    constant = PositionProjection.fit(statistics_of(torch.full((4, CELLS, 5), 0.1)))
    assert constant.basis.shape[1] == 0
    assert torch.equal(constant.remove(torch.ones(2, 5)), torch.ones(2, 5))


# --- controls


def test_controls_for_dense_tables():
    features = torch.randn(2, 5, *GRID)
    alone = position.position_only(2, GRID)
    both = position.add_position(features)
    for i in range(CELLS):
        expected = torch.zeros(CELLS)
        expected[i] = 1
        assert torch.equal(alone[1, :, i // 4, i % 4], expected)
        cell = both[0, :, i // 4, i % 4]
        assert torch.equal(cell, torch.cat([features[0, :, i // 4, i % 4], expected]))
    assert position.add_position(features.half()).dtype == torch.half


def test_pixels_of_patches():
    images = torch.randn(2, 3, 6, 12)
    found = position.pixel_patches(images, (2, 3))
    assert found.shape == (2, 18, 3, 4)
    for row in range(3):
        for column in range(4):
            patch = images[1, :, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
            assert torch.equal(found[1, :, row, column], patch.flatten())
    with pytest.raises(ValueError, match="4x4 do not fill images of 6x12"):
        position.pixel_patches(images, (4, 4))
