"""Pictures are read by people, so the tests read pixels: what is where, and in which colour."""

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
    accuracy_map,
    heat_picture,
    reconstruction_panel,
    save_png,
    unnormalize_patches,
)

SCALE = 4


def patch_colours(grid, channels=3):
    """One image (1, C, h*8, w*8) in which every 8x8 patch has its own flat colour, none of them grey or a frame's."""
    h, w = grid
    cells = torch.linspace(0.1, 0.9, h * w).reshape(h, w)
    planes = torch.stack([cells, cells.flip(0, 1) * 0.5, 0.2 + 0.1 * cells, 1 - cells][:channels])
    return planes.repeat_interleave(8, 1).repeat_interleave(8, 2)[None]


def panels(page, size, count, row=0):
    """Cut a page without titles into its pictures of one row."""
    height, width = size[0] * SCALE, size[1] * SCALE
    top = GAP + row * (height + GAP)
    return [page[top : top + height, GAP + i * (width + GAP) :][:, :width] for i in range(count)]


def middle(picture, cell, grid, dx=0.3):
    """The pixel in the middle row of a cell, left of its centre (where a dot may sit)."""
    ch, cw = picture.shape[0] // grid[0], picture.shape[1] // grid[1]
    return picture[cell // grid[1] * ch + ch // 2, cell % grid[1] * cw + int(dx * cw)]


def as_bytes(image):
    return (image[0].permute(1, 2, 0).double().numpy() * 255).round().astype(np.uint8)


def draw(image, visible, said, grid, prediction=None, **options):
    mask = torch.ones(1, grid[0] * grid[1])
    mask[0, visible] = 0
    prediction = torch.zeros_like(image) if prediction is None else prediction
    options = {"titles": False, "scale": SCALE, "patch_size": 8, **options}
    return reconstruction_panel(
        image,
        mask,
        prediction,
        grid=grid,
        visible_ids=torch.tensor([visible]),
        predicted_cells=torch.tensor([said]),
        **options,
    )


def test_masked_is_grey_and_visible_equals_the_input():
    grid, image = (3, 4), torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    prediction = 1 - image
    original, masked, reconstruction, _ = panels(
        draw(image, [0, 5, 11], [0, 5, 11], grid, prediction), (24, 32), 4
    )
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
    image, last = patch_colours(grid), grid[0] * grid[1] - 1
    size = image.shape[2:]
    positions = panels(draw(image, [0, last], [0, 1], grid), size, 4)[3]
    colours = as_bytes(image)[::8, ::8].reshape(-1, 3)
    assert (middle(positions, 0, grid) == colours[0]).all()  # right: in its own cell
    assert (positions[0, 0] == RIGHT).all()
    assert (middle(positions, 1, grid) == colours[last]).all()  # wrong: where the model said
    assert (positions[0, 8 * SCALE] == WRONG).all()
    assert (
        middle(positions, last, grid) != colours[last]
    ).any()  # and not where it belongs: there is the dot
    assert (middle(positions, last, grid, dx=0.5) == PAPER).all()
    assert (middle(positions, grid[1], grid) == REMOVED).all()  # nobody said this cell


def test_a_line_leads_from_the_named_cell_to_the_true_one():
    grid = (1, 5)
    positions = panels(draw(patch_colours(grid), [4], [0], grid), (8, 40), 4)[3]
    assert all((middle(positions, cell, grid) == WRONG).all() for cell in (1, 2, 3))
    positions = panels(draw(patch_colours(grid), [4], [4], grid), (8, 40), 4)[3]
    assert all((middle(positions, cell, grid) == REMOVED).all() for cell in (0, 1, 2, 3))


def test_in_a_crowded_cell_the_right_patch_is_on_top():
    grid = (3, 3)
    image = patch_colours(grid)
    colours = as_bytes(image)[::8, ::8].reshape(-1, 3)
    for visible in ([4, 0, 8], [0, 8, 4]):  # whatever the order of the tokens
        positions = panels(draw(image, visible, [4, 4, 4], grid), (24, 24), 4)[3]
        assert (middle(positions, 4, grid, dx=0.6) == colours[4]).all()
    assert (positions[63, 45] == RIGHT).all()  # its frame is whole, and the two cards below it stick out
    assert (positions[67, 45] == WRONG).all() and (positions[71, 45] == WRONG).all()


def test_a_card_does_not_cover_the_patch_of_the_next_cell():
    grid = (1, 4)
    colours = as_bytes(patch_colours(grid))[::8, ::8].reshape(-1, 3)
    for visible, said in (([2, 0, 3], [1, 0, 0]), ([0, 3, 2], [0, 0, 1]), ([3, 0, 2], [0, 0, 1])):
        positions = panels(draw(patch_colours(grid), visible, said, grid), (8, 32), 4)[3]
        assert (positions[:, 32:34] == WRONG).all()  # the left frame of patch 2 in cell 1
        assert (middle(positions, 1, grid) == colours[2]).all()


def test_rows_are_images():
    grid, images = (2, 2), torch.stack([torch.full((3, 16, 16), 0.2), torch.full((3, 16, 16), 0.8)])
    page = reconstruction_panel(
        images, np.ones((2, 4)), images, patch_size=8, grid=grid, titles=False, scale=SCALE
    )
    for row, value in ((0, 51), (1, 204)):
        original, masked, reconstruction = panels(page, (16, 16), 3, row)
        assert (original == value).all() and (reconstruction == value).all() and (masked == REMOVED).all()
    assert page.shape[1] == 3 * 64 + 4 * GAP  # no fourth column


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_channels(channels):
    grid = (2, 3)
    image = patch_colours(grid, channels)
    original = panels(draw(image, [1], [1], grid), (16, 24), 4)[0][::SCALE, ::SCALE]
    expected = as_bytes(image)[..., :3] if channels == 4 else as_bytes(image)[..., [0, 0, 0]]
    assert (original == expected).all()


def test_rectangular_patches_and_numpy_and_bfloat16():
    image = torch.rand(1, 3, 8, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = np.array([[1, 0, 1, 1]])
    page = reconstruction_panel(
        image, mask, np.zeros((1, 3, 8, 32)), patch_size=(4, 16), grid=(2, 2), titles=False, scale=SCALE
    )
    _, masked, reconstruction = (picture[::SCALE, ::SCALE] for picture in panels(page, (8, 32), 3))
    assert (masked[:4, 16:] == as_bytes(image.float())[:4, 16:]).all() and (masked[4:] == REMOVED).all()
    assert (reconstruction[:4, :16] == 0).all()


def test_a_prediction_out_of_range_is_clipped_and_nan_is_black():
    prediction = torch.tensor([-0.5, 1.5, float("nan")])[None, :, None, None].expand(1, 3, 16, 16)
    with np.errstate(invalid="raise"):
        page = draw(torch.full((1, 3, 16, 16), 0.5), [0], [0], (2, 2), prediction)
    assert (panels(page, (16, 16), 4)[2][-1, -1] == (0, 255, 0)).all()


def test_small_images_are_enlarged_until_they_can_be_read():
    small = reconstruction_panel(
        torch.zeros(1, 3, 64, 64),
        torch.ones(1, 64),
        torch.zeros(1, 3, 64, 64),
        patch_size=8,
        grid=(8, 8),
        titles=False,
    )
    assert small.shape == (192 + 2 * GAP, 3 * 192 + 4 * GAP, 3)
    large = reconstruction_panel(
        torch.zeros(1, 3, 224, 224),
        torch.ones(1, 196),
        torch.zeros(1, 3, 224, 224),
        patch_size=16,
        grid=(14, 14),
        titles=False,
    )
    assert large.shape == (224 + 2 * GAP, 3 * 224 + 4 * GAP, 3)
    fine = reconstruction_panel(
        torch.zeros(1, 3, 32, 32),
        torch.ones(1, 256),
        torch.zeros(1, 3, 32, 32),
        patch_size=2,
        grid=(16, 16),
        titles=False,
    )
    assert fine.shape == (256 + 2 * GAP, 3 * 256 + 4 * GAP, 3)  # a cell of 2 pixels is shown with 16


def test_titles_sit_above_and_differ_with_what_they_say():
    grid, image = (2, 2), torch.zeros(1, 3, 16, 16)
    bare = draw(image, [1], [1], grid)
    titled = draw(image, [1], [1], grid, titles=True, scale=12)
    head = titled.shape[0] - draw(image, [1], [1], grid, scale=12).shape[0]
    assert (
        head > 0
        and (titled[:head] < 100).any()
        and (titled[head + GAP : head + 2 * GAP, GAP : 2 * GAP] == 0).all()
    )
    assert (bare[:GAP] == PAPER).all()
    other = draw(image, [1], [0], grid, titles=True, scale=12)  # "1/1 right" becomes "0/1 right"
    last = 3 * (192 + GAP)
    assert (titled[:head, :last] == other[:head, :last]).all() and (
        titled[:head, last:] != other[:head, last:]
    ).any()
    name = "reconstruction (true patch mean/std)"
    long = draw(image, [1], [1], grid, titles=True, scale=12, reconstruction_title=name)
    assert long.shape[0] > titled.shape[0]  # two lines, so that it is not cut off


@pytest.mark.parametrize(
    "change,message",
    [
        ({"grid": (2, 3)}, "does not cover"),
        ({"mask": torch.ones(1, 5)}, "mask is"),
        ({"prediction": torch.zeros(1, 3, 8, 8)}, "must both be"),
        ({"visible_ids": torch.tensor([[1]])}, "both or none"),
        (
            {"visible_ids": torch.tensor([[1]]), "predicted_cells": torch.tensor([[4]])},
            "predicted_cells holds 4..4",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {
        "images": torch.zeros(1, 3, 16, 16),
        "mask": torch.ones(1, 4),
        "prediction": torch.zeros(1, 3, 16, 16),
        "patch_size": 8,
        "grid": (2, 2),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        reconstruction_panel(given.pop("images"), given.pop("mask"), given.pop("prediction"), **given)


def test_unnormalize_undoes_norm_pix_loss():
    target = torch.rand(2, 5, 48, generator=torch.Generator().manual_seed(0))
    mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)  # the lines of MAE's forward_loss
    normalised = (target - mean) / (var + 1.0e-6) ** 0.5
    torch.testing.assert_close(unnormalize_patches(normalised, target), target)
    torch.testing.assert_close(
        unnormalize_patches(torch.zeros(2, 5, 48), target.numpy()), mean.expand(2, 5, 48)
    )
    flat = unnormalize_patches(
        torch.full((2, 5, 48), 3.0), torch.ones(2, 5, 48)
    )  # without variance: 1e-6 is left
    torch.testing.assert_close(flat, torch.full((2, 5, 48), 1.003))
    with pytest.raises(ValueError, match="must both be"):
        unnormalize_patches(normalised[:, :4], target)


def test_accuracy_map_is_the_mean_per_true_cell():
    ids = torch.tensor([[0, 0, 1], [0, 5, 5]])
    correct = torch.tensor([[True, False, False], [True, True, True]])
    np.testing.assert_allclose(accuracy_map(correct, ids, (2, 3)), [[2 / 3, 0, np.nan], [np.nan, np.nan, 1]])
    with pytest.raises(ValueError, match=r"0\.\.3"):
        accuracy_map(correct, ids, (2, 2))


def test_heat_picture_orders_values_and_marks_unseen_cells():
    values = np.array([[0, 0.5, 1], [np.nan, 0.25, 0.75]])
    picture = heat_picture(values, cell=32)[GAP : GAP + 64, GAP : GAP + 96]
    inner = {value: picture[32 * r + 4, 32 * c + 16].astype(int) for (r, c), value in np.ndenumerate(values)}
    luma = [inner[value] @ [0.3, 0.6, 0.1] for value in (0, 0.25, 0.5, 0.75, 1)]
    assert luma == sorted(luma) and luma[-1] - luma[0] > 150
    assert (picture[32 + 4, 16] == REMOVED).all()
    clipped = heat_picture(np.array([[2.0, -1.0]]), cell=16)[GAP : GAP + 16, GAP : GAP + 32]
    assert (clipped[2, 2] == inner[1]).all() and (clipped[2, 18] == inner[0]).all()
    with pytest.raises(ValueError, match="low < high"):
        heat_picture(values, low=1.0)


def test_save_png_keeps_every_pixel(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    path = save_png(array, tmp_path / "new" / "a.png")
    assert (np.asarray(Image.open(path)) == array).all()
    with pytest.raises(ValueError, match="uint8"):
        save_png(array / 255, tmp_path / "b.png")
