"""Pictures are for people, so the tests read pixels: what is drawn where, and in which colour."""

import numpy as np
import pytest
import torch
from PIL import Image

from util.report.panels import (
    GAP,
    PAPER,
    REMOVED,
    RIGHT,
    WRONG,
    PredictedPositions,
    accuracy_map,
    reconstruction_panel,
    save_png,
    unnormalize_patches,
)

SCALE = 4


def patch_colours(grid, channels=3):
    """One image (1, C, h*8, w*8) whose 8x8 patches have one colour each, not grey and not a frame's."""
    h, w = grid
    cells = torch.linspace(0.1, 0.9, h * w).reshape(h, w)
    planes = torch.stack([cells, cells.flip(0, 1) * 0.5, 0.2 + 0.1 * cells, 1 - cells][:channels])
    return planes.repeat_interleave(8, 1).repeat_interleave(8, 2)[None]


def panels(page, size, count, row=0):
    """Cut a page without titles into its pictures of one row."""
    height = size[0] * SCALE
    width = size[1] * SCALE
    top = GAP + row * (height + GAP)
    return [page[top : top + height, GAP + i * (width + GAP) :][:, :width] for i in range(count)]


def middle(picture, cell, grid, dx=0.3):
    """The pixel in the middle row of a cell, left of its centre (where a dot may sit)."""
    height = picture.shape[0] // grid[0]
    width = picture.shape[1] // grid[1]
    return picture[cell // grid[1] * height + height // 2, cell % grid[1] * width + int(dx * width)]


def as_bytes(image):
    return (image[0].permute(1, 2, 0).double().numpy() * 255).round().astype(np.uint8)


def draw(image, visible, predicted, prediction=None, **options):
    """The picture of one image, whose cells `visible` are predicted to be the cells `predicted`."""
    options = {"titles": None, "scale": SCALE, "patch_size": 8, **options}
    mask = torch.ones(1, image.shape[2] * image.shape[3] // 64)
    mask[0, visible] = 0
    if prediction is None:
        prediction = torch.zeros_like(image)
    positions = PredictedPositions(torch.tensor([visible]), torch.tensor([predicted]))
    return reconstruction_panel(image, mask, prediction, positions=positions, **options)


def test_masked_is_grey_and_visible_equals_the_input():
    grid = (3, 4)
    image = torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    prediction = 1 - image
    original, masked, reconstruction, _ = panels(draw(image, [0, 5, 11], [0, 5, 11], prediction), (24, 32), 4)
    expected = as_bytes(image).repeat(SCALE, 0).repeat(SCALE, 1)
    guess = as_bytes(prediction).repeat(SCALE, 0).repeat(SCALE, 1)
    visible = np.zeros(grid, bool)
    visible.flat[[0, 5, 11]] = True
    visible = visible.repeat(8 * SCALE, 0).repeat(8 * SCALE, 1)
    assert (original == expected).all()
    assert (masked[visible] == expected[visible]).all() and (masked[~visible] == REMOVED).all()
    assert (reconstruction[visible] == expected[visible]).all() and (
        reconstruction[~visible] == guess[~visible]
    ).all()


@pytest.mark.parametrize("grid", [(8, 8), (3, 5), (14, 14)])
def test_a_right_answer_stays_and_a_wrong_one_moves(grid):
    image = patch_colours(grid)
    last = grid[0] * grid[1] - 1
    size = image.shape[2:]
    positions = panels(draw(image, [0, last], [0, 1]), size, 4)[3]
    colours = as_bytes(image)[::8, ::8].reshape(-1, 3)
    assert (middle(positions, 0, grid) == colours[0]).all()  # right: in its own cell
    assert (positions[0, 0] == RIGHT).all()
    assert (middle(positions, 1, grid) == colours[last]).all()  # wrong: in the predicted cell
    assert (positions[0, 8 * SCALE] == WRONG).all()
    # Not in its own cell, where the dot is.
    assert (middle(positions, last, grid) != colours[last]).any()
    assert (middle(positions, last, grid, dx=0.5) == PAPER).all()
    assert (middle(positions, grid[1], grid) == REMOVED).all()  # predicted for no patch


def test_a_line_leads_from_the_predicted_cell_to_the_true_one():
    grid = (1, 5)
    positions = panels(draw(patch_colours(grid), [4], [0]), (8, 40), 4)[3]
    assert all((middle(positions, cell, grid) == WRONG).all() for cell in (1, 2, 3))
    positions = panels(draw(patch_colours(grid), [4], [4]), (8, 40), 4)[3]
    assert all((middle(positions, cell, grid) == REMOVED).all() for cell in (0, 1, 2, 3))


def test_in_a_crowded_cell_the_right_patch_is_on_top():
    grid = (3, 3)
    image = patch_colours(grid)
    colours = as_bytes(image)[::8, ::8].reshape(-1, 3)
    for visible in ([4, 0, 8], [0, 8, 4]):  # in any order of the tokens
        positions = panels(draw(image, visible, [4, 4, 4]), (24, 24), 4)[3]
        assert (middle(positions, 4, grid, dx=0.6) == colours[4]).all()
    assert (positions[63, 45] == RIGHT).all()  # its frame is whole, and the two cards below it stick out
    assert (positions[67, 45] == WRONG).all() and (positions[71, 45] == WRONG).all()


def test_a_card_does_not_cover_the_patch_of_the_next_cell():
    grid = (1, 4)
    colours = as_bytes(patch_colours(grid))[::8, ::8].reshape(-1, 3)
    for visible, predicted in (([2, 0, 3], [1, 0, 0]), ([0, 3, 2], [0, 0, 1]), ([3, 0, 2], [0, 0, 1])):
        positions = panels(draw(patch_colours(grid), visible, predicted), (8, 32), 4)[3]
        assert (positions[:, 32:34] == WRONG).all()  # the left frame of patch 2 in cell 1
        assert (middle(positions, 1, grid) == colours[2]).all()


def test_rows_are_images():
    images = torch.stack([torch.full((3, 16, 16), 0.2), torch.full((3, 16, 16), 0.8)])
    page = reconstruction_panel(images, np.ones((2, 4)), images, patch_size=8, titles=None, scale=SCALE)
    for row, value in ((0, 51), (1, 204)):
        original, masked, reconstruction = panels(page, (16, 16), 3, row)
        assert (original == value).all() and (reconstruction == value).all() and (masked == REMOVED).all()
    assert page.shape[1] == 3 * 64 + 4 * GAP  # no fourth column


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_channels(channels):
    grid = (2, 3)
    image = patch_colours(grid, channels)
    original = panels(draw(image, [1], [1]), (16, 24), 4)[0][::SCALE, ::SCALE]
    shown = {1: [0, 0, 0], 2: [0, 0, 0], 4: [0, 1, 2]}[channels]
    expected = as_bytes(image)[..., shown]
    assert (original == expected).all()


def test_rectangular_patches_and_numpy_and_bfloat16():
    image = torch.rand(1, 3, 8, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = np.array([[1, 0, 1, 1]])
    page = reconstruction_panel(
        image, mask, np.zeros((1, 3, 8, 32)), patch_size=(4, 16), titles=None, scale=SCALE
    )
    _, masked, reconstruction = (picture[::SCALE, ::SCALE] for picture in panels(page, (8, 32), 3))
    assert (masked[:4, 16:] == as_bytes(image.float())[:4, 16:]).all() and (masked[4:] == REMOVED).all()
    assert (reconstruction[:4, :16] == 0).all()


def test_a_prediction_out_of_range_is_clipped_and_nan_is_black():
    prediction = torch.tensor([-0.5, 1.5, float("nan")])[None, :, None, None].expand(1, 3, 16, 16)
    with np.errstate(invalid="raise"):
        page = draw(torch.full((1, 3, 16, 16), 0.5), [0], [0], prediction)
    assert (panels(page, (16, 16), 4)[2][-1, -1] == (0, 255, 0)).all()


def test_small_images_are_enlarged_until_they_can_be_read():
    small = reconstruction_panel(
        torch.zeros(1, 3, 64, 64),
        torch.ones(1, 64),
        torch.zeros(1, 3, 64, 64),
        patch_size=8,
        titles=None,
    )
    assert small.shape == (192 + 2 * GAP, 3 * 192 + 4 * GAP, 3)
    large = reconstruction_panel(
        torch.zeros(1, 3, 224, 224),
        torch.ones(1, 196),
        torch.zeros(1, 3, 224, 224),
        patch_size=16,
        titles=None,
    )
    assert large.shape == (224 + 2 * GAP, 3 * 224 + 4 * GAP, 3)
    fine = reconstruction_panel(
        torch.zeros(1, 3, 32, 32),
        torch.ones(1, 256),
        torch.zeros(1, 3, 32, 32),
        patch_size=2,
        titles=None,
    )
    assert fine.shape == (256 + 2 * GAP, 3 * 256 + 4 * GAP, 3)  # a cell of 2 pixels is shown with 16


def test_titles_stand_above_and_show_the_number_of_right_predictions():
    image = torch.zeros(1, 3, 16, 16)
    bare = draw(image, [1], [1])
    titled = draw(image, [1], [1], titles=("original", "reconstruction"), scale=12)
    head = titled.shape[0] - draw(image, [1], [1], scale=12).shape[0]
    assert (
        head > 0
        and (titled[:head] < 100).any()
        and (titled[head + GAP : head + 2 * GAP, GAP : 2 * GAP] == 0).all()
    )
    assert (bare[:GAP] == PAPER).all()
    other = draw(
        image, [1], [0], titles=("original", "reconstruction"), scale=12
    )  # "1/1 right" becomes "0/1 right"
    last = 3 * (192 + GAP)
    assert (titled[:head, :last] == other[:head, :last]).all() and (
        titled[:head, last:] != other[:head, last:]
    ).any()
    name = "reconstruction (true patch mean/std)"
    long = draw(image, [1], [1], titles=("original", name), scale=12)
    assert long.shape[0] > titled.shape[0]  # two lines, so that it is not cut off


@pytest.mark.parametrize(
    "change,message",
    [
        ({"patch_size": (8, 6)}, "`patch_size` .* does not divide"),
        ({"mask": torch.ones(1, 5)}, "mask is"),
        ({"prediction": torch.zeros(1, 3, 8, 8)}, "must both be"),
        ({"positions": PredictedPositions(torch.tensor([[1]]), torch.tensor([1]))}, "must both be"),
        (
            {"positions": PredictedPositions(torch.tensor([[1]]), torch.tensor([[4]]))},
            r"predicted holds 4\.\.4",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    options = {
        "images": torch.zeros(1, 3, 16, 16),
        "mask": torch.ones(1, 4),
        "prediction": torch.zeros(1, 3, 16, 16),
        "patch_size": 8,
    }
    with pytest.raises(ValueError, match=message):
        reconstruction_panel(**options | change)


def test_unnormalize_undoes_norm_pix_loss():
    target = torch.rand(2, 5, 48, generator=torch.Generator().manual_seed(0))
    # The lines of MAE's forward_loss.
    mean = target.mean(-1, keepdim=True)
    var = target.var(-1, keepdim=True)
    normalised = (target - mean) / (var + 1.0e-6) ** 0.5
    torch.testing.assert_close(unnormalize_patches(normalised, target), target)
    torch.testing.assert_close(
        unnormalize_patches(torch.zeros(2, 5, 48), target.numpy()), mean.expand(2, 5, 48)
    )
    # Without variance, 1e-6 is left.
    flat = unnormalize_patches(torch.full((2, 5, 48), 3.0), torch.ones(2, 5, 48))
    torch.testing.assert_close(flat, torch.full((2, 5, 48), 1.003))
    with pytest.raises(ValueError, match="must both be"):
        unnormalize_patches(normalised[:, :4], target)


def test_accuracy_map_is_the_mean_per_true_cell():
    ids = torch.tensor([[0, 0, 1], [0, 5, 5]])
    correct = torch.tensor([[True, False, False], [True, True, True]])
    np.testing.assert_allclose(accuracy_map(correct, ids, (2, 3)), [[2 / 3, 0, np.nan], [np.nan, np.nan, 1]])
    with pytest.raises(ValueError, match=r"0\.\.3"):
        accuracy_map(correct, ids, (2, 2))


def test_save_png_keeps_every_pixel(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    path = save_png(array, tmp_path / "new" / "a.png")
    assert (np.asarray(Image.open(path)) == array).all()
    with pytest.raises(ValueError, match="uint8"):
        save_png(array / 255, tmp_path / "b.png")
