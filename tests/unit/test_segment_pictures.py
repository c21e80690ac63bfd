"""Pictures of segmentation: colours, errors, the panel and its legend; the command; pictures of a run."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from sklearn.metrics import accuracy_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tiny  # noqa: F401 (registers vit_test)
import visualize
from backbones.registry import build_classifier
from layers.segmentation import Segmenter
from processes import COMMON, assert_same, here, last, log_lines
from util.flags.parser import parse, run
from util.report import runs
from util.report.panels import GAP, sheet
from util.report.segments import (
    COLOURS,
    DIMMED,
    IGNORED,
    LARGEST_SIDE,
    WRONG,
    SegmentView,
    cielab,
    coloured,
    drawn_size,
    errors,
    legend,
    palette,
    segment_panel,
    wrong_share,
)

NAMES = ["sky", "tree", "car", "road"]


def call(*argv) -> int:
    return run(visualize.main, parse(visualize.get_args_parser(), [str(a) for a in argv]))


def random_view(height=30, width=40, classes=4, seed=0, size=(20, 24)) -> SegmentView:
    draws = np.random.default_rng(seed)
    truth = draws.integers(-1, classes, (height, width)).astype(np.int16)
    right = draws.random((height, width)) < 0.5
    prediction = np.where(right & (truth >= 0), truth, draws.integers(0, classes, (height, width)))
    image = draws.integers(0, 256, (3, *size), dtype=np.uint8)
    return SegmentView(torch.from_numpy(image), torch.from_numpy(truth), torch.from_numpy(prediction))


def find(page: np.ndarray, picture: np.ndarray) -> tuple[int, int] | None:
    """The place (top, left) of a picture in a page."""
    windows = np.lib.stride_tricks.sliding_window_view(page, picture.shape[1:2], axis=1)  # (H, W', 3, w)
    starts = np.argwhere((windows == picture[0].T).all((2, 3)))
    height, width = picture.shape[:2]
    for top, left in starts.tolist():
        if np.array_equal(page[top : top + height, left : left + width], picture):
            return top, left
    return None


@pytest.fixture
def texts(monkeypatch):
    """The texts that are drawn."""
    found = []
    plain = ImageDraw.ImageDraw.text

    def text(self, place, words, *rest, **options):
        found.append(words)
        return plain(self, place, words, *rest, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return found


# --- colours


def test_cielab_has_the_known_values():
    # Of sRGB's primaries, white, black and mid grey for D65.
    colours = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [128, 128, 128]]
    expected = [
        [53.24, 80.09, 67.20],
        [87.73, -86.18, 83.18],
        [32.30, 79.19, -107.86],
        [100, 0, 0],
        [0, 0, 0],
        [53.59, 0, 0],
    ]
    assert np.allclose(cielab(np.array(colours, np.uint8)), expected, atol=0.05)


def test_colours_of_classes_are_fixed_and_different():
    many = palette(COLOURS)
    assert many.dtype == np.uint8 and many.shape == (COLOURS, 3)
    assert len(np.unique(many, axis=0)) == COLOURS
    for count in (0, 1, 11, 150):
        assert (palette(count) == many[:count]).all()
    assert (palette(COLOURS + 5)[COLOURS:] == many[:5]).all(), "later classes begin again"
    # Known forever: pictures of one data set can be compared over versions.
    assert many[:3].tolist() == [[180, 225, 75], [255, 135, 255], [180, 45, 0]]
    for count, least in ((11, 40), (21, 30), (150, 10)):
        lab = cielab(np.concatenate([many[:count], np.array([IGNORED], np.uint8)]))
        apart = np.linalg.norm(lab[:, None] - lab, axis=-1) + 1000 * np.eye(len(lab))
        assert apart[:count, :count].min() > least
        assert apart[-1].min() > 24, "no class looks like ignored pixels"


def test_masks_are_coloured_pixel_by_pixel():
    mask = random_view(classes=30).truth
    expected = np.zeros((30, 40, 3), np.uint8)
    for y in range(30):
        for x in range(40):
            number = int(mask[y, x])
            expected[y, x] = IGNORED if number == -1 else palette(30)[number]
    assert (coloured(mask) == expected).all() and (coloured(mask.numpy()) == expected).all()
    with pytest.raises(ValueError, match="classes from -1 on"):
        coloured(np.array([[-2]]))


def test_errors_are_red_and_ignored_pixels_grey():
    view = random_view(size=(30, 40))
    image = view.image.numpy().transpose(1, 2, 0)
    found = errors(image, view.truth, view.prediction)
    kinds = set()
    for y in range(30):
        for x in range(40):
            truth, prediction = int(view.truth[y, x]), int(view.prediction[y, x])
            if truth == -1:
                kinds.add("ignored")
                assert found[y, x].tolist() == list(IGNORED)
            elif truth != prediction:
                kinds.add("wrong")
                assert found[y, x].tolist() == list(WRONG)
            else:
                kinds.add("right")
                assert np.abs(found[y, x] - DIMMED * image[y, x]).max() <= 0.5
    assert len(kinds) == 3
    assert min(IGNORED) > DIMMED * 255
    with pytest.raises(ValueError, match="must have one size"):
        errors(image, view.truth[:9], view.prediction[:9])


def test_the_share_of_wrong_pixels_is_scikit_learns():
    view = random_view()
    counted = view.truth >= 0
    expected = 100 - 100 * accuracy_score(view.truth[counted], view.prediction[counted])
    assert abs(wrong_share(view.truth, view.prediction) - expected) < 1e-9
    assert np.isnan(wrong_share(torch.full((2, 2), -1), torch.zeros(2, 2)))


# --- the panel


@pytest.mark.parametrize(
    "size, expected",
    [
        ((30, 40), (150, 200)),
        ((192, 100), (192, 100)),
        ((360, 480), (360, 480)),
        ((1024, 2048), (240, 480)),
        ((2000, 1), (480, 1)),
        ((1, 1), (192, 192)),
    ],
)
def test_drawn_sizes(size, expected):
    assert drawn_size(size) == expected and max(expected) <= LARGEST_SIDE


def test_a_panel_shows_image_truth_prediction_and_error(texts):
    view = random_view()
    page = segment_panel([view], NAMES, ", bands 0 1 2")
    assert page.dtype == np.uint8 and page.shape[1] == 4 * 200 + 5 * GAP
    big = np.ones((5, 5), int)
    truth = np.kron(view.truth.numpy(), big)
    prediction = np.kron(view.prediction.numpy(), big)
    pixels = Image.fromarray(view.image.numpy().transpose(1, 2, 0))
    image = np.asarray(pixels.resize((200, 150), Image.Resampling.BILINEAR))
    places = [
        find(page, picture)
        for picture in (image, coloured(truth), coloured(prediction), errors(image, truth, prediction))
    ]
    assert None not in places
    assert len({top for top, _ in places}) == 1
    assert [left for _, left in places] == [GAP + i * (200 + GAP) for i in range(4)]
    wrong = 100 * np.mean((truth != prediction)[truth >= 0])
    assert texts[0] == "image, bands 0 1 2" and f"{wrong:.1f} % wrong" in texts
    assert texts[-5:] == [*NAMES, "ignored"]


def test_rows_have_their_own_sizes(texts):
    views = [random_view(), random_view(1000, 500, seed=1), random_view(40, 30, seed=2, size=(9, 7))]
    page = segment_panel(views, NAMES)
    tops = []
    for view in views:
        height, width = drawn_size(view.truth.shape)
        rows = ((np.arange(height) + 0.5) * view.truth.shape[0] / height).astype(int)
        columns = ((np.arange(width) + 0.5) * view.truth.shape[1] / width).astype(int)
        place = find(page, coloured(view.truth[rows][:, columns]))
        assert place is not None
        tops.append(place[0])
    assert tops[1] - tops[0] == tops[2] - tops[1] - 480 + 150
    assert sum(text.endswith("% wrong") for text in texts) == 3


def test_one_band_is_grey():
    view = random_view()
    page = segment_panel([view._replace(image=view.image[:1])], NAMES)
    shown = page[40:100, 20:100]
    assert (shown == shown[..., :1]).all() and shown.std() > 10


def test_the_legend_names_what_occurs(texts):
    picture = legend(np.array([0, 5, 0, 1, 0]), NAMES, 300)
    assert texts == ["sky", "car"] and picture.shape[1:] == (300, 3)
    colours = {tuple(colour) for colour in picture.reshape(-1, 3).tolist()}
    for number, colour in enumerate(palette(4).tolist()):
        assert (tuple(colour) in colours) == (number in (0, 2))
    assert tuple(IGNORED) not in colours
    # A class that is predicted only.
    texts.clear()
    segment_panel([SegmentView(np.zeros((3, 4, 4), np.uint8), np.zeros((4, 4)), np.full((4, 4), 3))], NAMES)
    assert texts[-2:] == ["sky", "road"]


def test_the_legend_of_many_classes(texts):
    names = ["a\x1b[31m" + "b" * 100, *map(str, range(1, 200))]
    picture = legend(np.arange(201)[::-1], names, 400)
    assert len(texts) == 62 and texts[-2:] == ["ignored", "and 139 more"]
    assert texts[:2] == ["a\\x1b[31m" + "b" * 28 + "...", "1"] and len(texts[0]) <= 40
    assert "59" in texts and "60" not in texts, "those with the most pixels"
    # Nothing is drawn beyond the right border: a border of paper is left.
    assert (picture[:, -1] == 255).all() and picture.shape[0] > 100


@pytest.mark.parametrize(
    "view, message",
    [
        (random_view()._replace(prediction=torch.zeros(3, 3)), "must both be"),
        (random_view(classes=5), "there are 4 names"),
        (random_view()._replace(image=torch.zeros(2, 4, 4, dtype=torch.uint8)), "1 or 3, h, w"),
        (random_view()._replace(image=torch.zeros(3, 4, 4)), "uint8"),
    ],
)
def test_panels_refuse_what_does_not_fit(view, message):
    with pytest.raises(ValueError, match=message):
        segment_panel([view], NAMES)


def test_a_panel_needs_an_image():
    with pytest.raises(ValueError, match="no image"):
        segment_panel([], NAMES)


def test_sheets_of_unequal_rows():
    columns = [[np.full((h, w, 3), 9 * i, np.uint8) for h, w in ((4, 7), (8, 3))] for i in (1, 2)]
    page = sheet(columns, [], ["", ""])
    assert page.shape == (4 + 8 + 3 * GAP, 2 * 7 + 3 * GAP, 3)
    assert (page[:, :, 0] == 9).sum() == (page[:, :, 0] == 18).sum() == 4 * 7 + 8 * 3


# --- the command


SIDE = 48


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """6 validation images of unequal sizes, with 3 classes and ignored pixels."""
    folder = tmp_path_factory.mktemp("data")
    draws = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 6)):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(count):
            height, width = SIDE, SIDE + 8 * (i % 2)
            mask = np.kron(draws.integers(0, 4, (height // 8, width // 8)), np.ones((8, 8), int))
            image = 80 * mask[..., None] + draws.integers(0, 16, (height, width, 3))
            mask[mask == 3] = 255
            Image.fromarray(image.astype(np.uint8).clip(0, 255)).save(folder / f"images/{split}/{i}.png")
            Image.fromarray(mask.astype(np.uint8)).save(folder / f"masks/{split}/{i}.png")
    (folder / "classes.txt").write_text("dark\nmedium\nbright\n")
    return folder


FLAGS = {
    "model": "vit_test",
    "input_size": [32],
    "in_chans": 3,
    "eval_images": "own",
    "head": "linear",
    "num_classes": 3,
    "ignore_index": 255,
    "reduce_zero_label": False,
    "upsample": "bilinear",
    "max_res": 1000,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
}


def segmenter(classes=3):
    torch.manual_seed(0)
    backbone = build_classifier("vit_test", img_size=(32, 32), num_classes=0, pos_embed="learned")
    model = Segmenter(backbone, classes).eval()
    # New heads are almost zero.
    torch.nn.init.normal_(model.segment_head.classify.weight)
    torch.nn.init.normal_(model.backbone.pos_embed, std=0.1)
    return model


def saved(path, model, names=("dark", "medium", "bright"), **changed):
    torch.save({"model": model.state_dict(), "args": FLAGS | changed, "classes": list(names)}, path)
    return path


def expected_panel(model, data, numbers, upsample="bilinear", exact=None):
    views = []
    for i in numbers:
        image = torch.from_numpy(np.array(Image.open(data / f"images/val/{i}.png"))).permute(2, 0, 1)
        mask = torch.from_numpy(np.array(Image.open(data / f"masks/val/{i}.png"))).long()
        mask[mask == 255] = -1
        if exact:
            pixels = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(exact[::-1], Image.BICUBIC)
            image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
        with torch.no_grad():
            logits = model((image[None] / 255 - 0.5) / 0.25)
        align = {} if upsample == "nearest-exact" else {"align_corners": False}
        logits = F.interpolate(logits, size=mask.shape, mode=upsample, **align)
        views.append(SegmentView(image, mask, logits.argmax(1)[0]))
    assert len(torch.cat([view.prediction.flatten() for view in views]).unique()) > 1
    return segment_panel(views, ["dark", "medium", "bright"])


def picture(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_the_command_draws_the_predictions(data, tmp_path, capsys):
    model = segmenter()
    path = saved(tmp_path / "s.pth", model)
    assert call("segments", path, tmp_path / "a.png", "--data_path", data, "--images", 3) == 0
    assert "wrote" in capsys.readouterr().out
    assert (picture(tmp_path / "a.png") == expected_panel(model, data, [0, 2, 4])).all()
    # More than there are, and other logits.
    saved(path, model, upsample="nearest")
    assert call("segments", path, tmp_path / "b.png", "--data_path", data, "--images", 9) == 0
    expected = expected_panel(model, data, range(6), "nearest-exact")
    assert (picture(tmp_path / "b.png") == expected).all()


def test_images_are_prepared_as_the_run_evaluates_them(data, tmp_path):
    model = segmenter()
    path = saved(tmp_path / "s.pth", model, eval_images="exact")
    assert call("segments", path, tmp_path / "a.png", "--data_path", data, "--images", 2) == 0
    found = picture(tmp_path / "a.png").astype(int)
    expected = expected_panel(model, data, [0, 3], exact=(32, 32))
    # PIL and torchvision round some pixels of the image in another way.
    assert found.shape == expected.shape and (np.abs(found - expected).max(-1) > 2).mean() < 0.01
    shorter = saved(tmp_path / "t.pth", model, eval_images="short", eval_side=24)
    assert call("segments", shorter, tmp_path / "b.png", "--data_path", data, "--images", 1) == 0
    expected = expected_panel(model, data, [0], exact=(24, 24))
    assert (np.abs(picture(tmp_path / "b.png").astype(int) - expected).max(-1) > 2).mean() < 0.01
    own = saved(tmp_path / "o.pth", model)
    assert call("segments", own, tmp_path / "d.png", "--data_path", data, "--images", 2) == 0
    windows = saved(tmp_path / "w.pth", model, window=[32], stride=None)
    assert call("segments", windows, tmp_path / "c.png", "--data_path", data, "--images", 2) == 0
    assert (picture(tmp_path / "c.png") != picture(tmp_path / "d.png")).any()


def test_unreadable_images_are_left_out(data, tmp_path, capsys):
    broken = tmp_path / "broken"
    for kind in ("images", "masks"):
        (broken / kind / "val").mkdir(parents=True)
        for i in range(2):
            (broken / kind / "val" / f"{i}.png").write_bytes((data / kind / "val" / f"{i}.png").read_bytes())
    (broken / "classes.txt").write_text("dark\nmedium\nbright\n")
    (broken / "images/val/0.png").write_bytes(b"no picture")
    model = segmenter()
    path = saved(tmp_path / "s.pth", model)
    assert call("segments", path, tmp_path / "a.png", "--data_path", broken) == 0
    assert "left out 1 image that cannot be read" in capsys.readouterr().out
    assert (picture(tmp_path / "a.png") == expected_panel(model, broken, [1])).all()
    (broken / "images/val/1.png").write_bytes(b"no picture")
    assert call("segments", path, tmp_path / "a.png", "--data_path", broken) == 2
    assert "none of 2 images" in capsys.readouterr().err


def refused(capsys, *argv) -> str:
    assert call("segments", *argv) == 2
    text = capsys.readouterr().err
    assert len(text.strip().splitlines()) == 1
    return text


def test_mistakes_are_one_line(data, tmp_path, capsys):
    model = segmenter()
    path = saved(tmp_path / "s.pth", model)
    out = tmp_path / "a.png"
    (tmp_path / "empty").mkdir()
    assert "no images with masks" in refused(capsys, path, out, "--data_path", tmp_path / "empty")
    assert "--images 0" in refused(capsys, path, out, "--data_path", data, "--images", 0)
    other = saved(tmp_path / "o.pth", model, names=("a", "b", "c"))
    assert "was trained on a, b, c" in refused(capsys, other, out, "--data_path", data)
    torch.save({"model": model.backbone.state_dict(), "args": FLAGS}, tmp_path / "c.pth")
    text = refused(capsys, tmp_path / "c.pth", out, "--data_path", data)
    assert "is an encoder without decoder and heads, not a segmenter of main_segment.py" in text
    torch.save({"model": model.state_dict()}, tmp_path / "bare.pth")
    text = refused(capsys, tmp_path / "bare.pth", out, "--data_path", data)
    assert "does not store" in text
    assert not out.exists()


@pytest.mark.parametrize(
    "flags",
    [
        {"head": ["linear"], "eval_side": "x", "eval_images": 3, "pos_embed": [1], "max_res": "1000"},
        {"window": {}, "stride": [9], "ignore_index": True, "reduce_zero_label": "yes", "upsample": 0},
    ],
)
def test_stored_flags_of_strange_types_do_not_matter(data, tmp_path, flags):
    path = saved(tmp_path / "s.pth", segmenter(), **flags)
    assert call("segments", path, tmp_path / "a.png", "--data_path", data, "--images", 1) == 0


@pytest.mark.parametrize("flags", [{"head": "upernet"}, {"input_size": [64]}, {"num_classes": 1}])
def test_stored_flags_that_do_not_fit_are_one_line(data, tmp_path, capsys, flags):
    path = saved(tmp_path / "s.pth", segmenter(), **flags)
    refused(capsys, path, tmp_path / "a.png", "--data_path", data)


# --- a run


RUN = ["main_segment", "--model", "vit_test", *COMMON, "--batch_size", "4", "--no-photo"]


@pytest.mark.slow
def test_a_run_draws_its_predictions_and_ends_with_the_same_bits(data, tmp_path, monkeypatch):
    import main_segment

    flags = ["--data_path", data, "--epochs", 3, "--eval_freq", 2, "--drop_path", 0.5]
    code, text = here(tmp_path / "drawn", *flags, "--log_dir", tmp_path / "board", main=RUN)
    assert code == 0, text
    folder = tmp_path / "drawn/pictures"
    assert [path.name for path in sorted(folder.iterdir())] == ["epoch-0000.png", "epoch-0002.png"]
    assert f"picture: {folder}/epoch-0002.png" in text
    # The command draws the same, and TensorBoard has it.
    assert call("segments", tmp_path / "drawn", tmp_path / "a.png", "--data_path", data) == 0
    assert (picture(tmp_path / "a.png") == picture(folder / "epoch-0002.png")).all()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert events.Tags()["images"] == ["segments"]
    assert [image.step for image in events.Images("segments")] == [1000, 3000]
    # Pictures change nothing else.
    monkeypatch.setattr(main_segment.Segmenting, "draw", lambda *given: None)
    code, text = here(tmp_path / "plain", *flags, main=RUN)
    assert code == 0 and not (tmp_path / "plain/pictures").exists(), text
    assert_same(last(tmp_path / "drawn"), last(tmp_path / "plain"))
    assert log_lines(tmp_path / "drawn") == log_lines(tmp_path / "plain")


def test_reports_show_the_usual_figure_of_segmentation():
    log = [{"epoch": 0, "train_loss": 2.0, "test_miou": 10.0, "test_miou_all": 9.0, "test_acc1": 1.0}]
    record = runs.RunRecord("a", "a", {}, log, "a", [{"segment/test_miou": 30.0, "segment/epoch": 0}])
    assert runs.metrics_of([record]) == ["segment/test_miou", "test_acc1", "test_miou"]
