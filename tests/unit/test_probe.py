"""MAE's protocol of linear probing against slow oracles, and probes of an earlier protocol."""

import argparse
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms as tv

import main_finetune
import main_linprobe
import tiny  # noqa: F401 (registers mae_test and vit_test)
from commands import call
from layers.probe import pool_tokens, pooled
from models_mae_pl import MODELS
from small_run import samples
from util.data.pixels import Pixels
from util.data.transforms import OneDrawCrop, TorchvisionCrop, pretrain_transform, probe_transform
from util.flags.groups import IMAGENET_MEAN, IMAGENET_STD
from util.flags.parser import parse
from util.run.frozen import check_encoder
from util.train.lr_sched import set_lr
from util.train.optim import lars
from util.train.setup import Setup
from util.weights import checkpoint
from util.weights.types import Checkpoint

SETUP = Setup(torch.device("cpu"), "fp32", (32, 32), Pixels(IMAGENET_MEAN, IMAGENET_STD))


@pytest.fixture(scope="module")
def encoder() -> Checkpoint:
    """Weights of MAE's kind whose final norm differs from a new one."""
    torch.manual_seed(1)
    model = MODELS["mae_test"](img_size=(32, 32), pos_embed="sincos", pos_label="none")
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    return Checkpoint("x.pth", model.state_dict(), {"model": "mae_test"})


def flags(*given, start: Checkpoint | None = None):
    words = ["--model", "vit_test", "--finetune", "F", "--device", "cpu", *map(str, given)]
    return main_linprobe.as_trained(parse(main_linprobe.get_args_parser(), words), start)


def probe_of(args, encoder: Checkpoint) -> main_linprobe.Probing:
    backbone = main_linprobe.load_backbone(args, encoder, SETUP, {})
    loader = torch.utils.data.DataLoader(samples())  # of two classes
    return main_linprobe.build_objective(args, backbone, SETUP, loader)


# --- the crop ---


@pytest.mark.parametrize("height, width", [(375, 500), (500, 333), (7, 300), (2, 3)])
def test_the_probes_crop_is_drawn_once_and_cut(height, width):
    """MAE: a share of the area, a ratio of the sides, each side at most the image's, then a place."""
    ours = probe_transform(8)
    for seed in range(100):
        torch.manual_seed(seed)
        area = torch.empty(1).uniform_(0.08, 1).item() * height * width
        ratio = math.exp(torch.empty(1).uniform_(*torch.tensor([3 / 4, 4 / 3]).log().tolist()).item())
        w = min(max(round(math.sqrt(area * ratio)), 1), width)
        h = min(max(round(math.sqrt(area / ratio)), 1), height)
        top, left = (int(torch.randint(free + 1, (1,))) for free in (height - h, width - w))
        flip = torch.rand(1).item() < 0.5
        torch.manual_seed(seed)
        assert ours.draw(height, width) == (top, left, h, w, flip, False, 0) == ours.draw(height, width, seed)


def test_the_probes_crops_are_larger_than_torchvisions():
    """Of 500 x 375 pixels they show 51.9 % on average, torchvision's 43.3 %.

    The first figure is the mean over the shares and ratios. The standard error of 20,000 draws is 0.0017.
    """
    share, log_ratio = torch.meshgrid(
        torch.linspace(0.08, 1, 801), torch.linspace(math.log(3 / 4), math.log(4 / 3), 801), indexing="ij"
    )
    width = (share * 500 * 375 * log_ratio.exp()).sqrt().clamp(max=500)
    height = (share * 500 * 375 / log_ratio.exp()).sqrt().clamp(max=375)
    expected = (width * height).mean().item() / (500 * 375)
    assert round(expected, 3) == 0.519
    torch.manual_seed(0)
    crop = probe_transform(8)
    boxes = [crop.draw(375, 500) for _ in range(20_000)]
    assert abs(sum(b.height * b.width for b in boxes) / 20_000 / (500 * 375) - expected) < 0.006
    image = torch.empty(1, 375, 500)
    boxes = [tv.RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(20_000)]
    assert abs(sum(h * w for _, _, h, w in boxes) / 20_000 / (500 * 375) - 0.433) < 0.006


# --- features, head and optimizer ---


def maes_features(encoder: Checkpoint, images: torch.Tensor, pool: str) -> torch.Tensor:
    """timm's model in float64, which has MAE's names, and its form of both poolings."""
    vit = pytest.importorskip("timm.models.vision_transformer").VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=0,
        norm_layer=lambda width, **_: torch.nn.LayerNorm(width, eps=1e-6),
        global_pool={"cls": "token"}.get(pool, pool),
    )
    weights = {k: v for k, v in encoder.model.items() if not k.startswith(("decoder", "mask_token"))}
    new = vit.load_state_dict(weights, strict=False).missing_keys
    assert new == ["fc_norm.weight", "fc_norm.bias"] * (pool == "avg")
    return vit.double().eval()(images.double())


def maes_steps(x, y, weight, bias, lr, weight_decay, steps):
    """MAE's head, loss and LARS in float64 -> weight, bias, mean and variance of the features."""
    mean, variance = x.mean(0), ((x - x.mean(0)) ** 2).mean(0)
    standard = (x - mean) / (variance + 1e-6).sqrt()
    velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    for _ in range(steps):
        error = torch.softmax(standard @ weight.T + bias, 1) - F.one_hot(y, len(bias)).double()
        gradient = error.T @ standard / len(x) + weight_decay * weight
        velocity = 0.9 * velocity + gradient * 0.001 * weight.norm() / gradient.norm()
        bias_velocity = 0.9 * bias_velocity + error.mean(0)
        weight, bias = weight - lr * velocity, bias - lr * bias_velocity
    return weight, bias, mean, variance * len(x) / (len(x) - 1)


@pytest.mark.parametrize("pool, weight_decay", [("cls", 0.0), ("avg", 0.0), ("avg", 2.0)])
def test_steps_of_the_probe_are_maes(encoder, pool, weight_decay):
    """Logits after four steps at a rate that moves the weights far, in evaluation as well."""
    pooling = {"cls": "--cls_token", "avg": "--global_pool"}[pool]
    objective = probe_of(flags(pooling, "--lr_grid", 1), encoder)
    head, lr = objective.probe.head[1], 4.0
    assert 0.005 < head.weight.std() < 0.02 and (head.bias == 0).all(), "MAE: std 0.01, and 0"
    weight, bias = (p.detach().double() for p in (head.weight, head.bias))
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 2
    optimizer = lars(objective.probe.head[1:], [1.0], lr, weight_decay)
    set_lr(optimizer, lr)
    for _ in range(4):
        optimizer.zero_grad()
        objective.loss(objective.probe, {"image": images, "label": labels})[0].backward()
        optimizer.step()
    x = maes_features(encoder, images, pool)
    trained, trained_bias, mean, variance = maes_steps(x, labels, weight, bias, lr, weight_decay, 4)
    assert (trained - weight).norm() > 0.03 * weight.norm()
    assert torch.allclose(head.weight.double(), trained, rtol=1e-4, atol=1e-6)
    assert torch.allclose(head.bias.double(), trained_bias, rtol=1e-4, atol=1e-6)
    # Running statistics start at 0 and 1, and follow with momentum 0.1.
    running, spread = mean * (1 - 0.9**4), variance * (1 - 0.9**4) + 0.9**4
    new = torch.randn(8, 3, 32, 32)
    expected = (maes_features(encoder, new, pool) - running) / (
        spread + 1e-6
    ).sqrt() @ trained.T + trained_bias
    with torch.no_grad():
        found = objective.probe.eval()(objective.features(new))[0]
    assert torch.allclose(found.double(), expected, atol=1e-4), (found - expected).abs().max()


def test_the_norm_after_the_mean_is_not_the_encoders(encoder):
    """The same model with its final norm, pooled after it, gives other features; so kNN has it."""
    images = torch.randn(4, 3, 32, 32)
    backbone = main_linprobe.load_backbone(flags("--global_pool"), encoder, SETUP, {})
    neighbours = main_linprobe.load_backbone(flags("--global_pool", "--knn"), encoder, SETUP, {})
    assert neighbours.fc_norm is None and torch.equal(neighbours.norm.weight, encoder.model["norm.weight"])
    norm = backbone.fc_norm
    assert (norm.eps, norm.weight.unique().tolist(), norm.bias.unique().tolist()) == (1e-6, [1], [0])
    found = pooled(backbone, images, "avg")
    other = pool_tokens(neighbours.forward_features(images), 1, "avg")
    assert (found - other).abs().max() > 0.01
    assert found.mean(1).abs().max() < 1e-5 and (found.var(1, unbiased=False) - 1).abs().max() < 1e-3
    second_order = probe_of(flags("--global_pool", "--head", "second_order", "--so_dims", 8, 4), encoder)
    assert torch.allclose(second_order.features(images)[:, 0], found), "one pooled feature for both heads"


@pytest.mark.parametrize("name", ["swin_pico", "so_vit_7", "deit_pico_distilled_patch8"])
def test_other_backbones_are_pooled_after_their_final_norm(name):
    model = main_linprobe.build_classifier(name, img_size=(32, 32), num_classes=0).eval()
    state = Checkpoint("x.pth", model.state_dict(), {"model": name})
    args = flags("--model", name, "--global_pool", "--pos_embed", model.trunk.pos_embed)
    backbone = main_linprobe.load_backbone(args, state, SETUP, {})
    images = torch.randn(2, 3, 32, 32)
    expected = pool_tokens(model.forward_features(images), model.num_prefix, "avg")
    assert torch.equal(pooled(backbone, images, "avg"), expected)


# --- probes of an earlier protocol ---


def test_an_earlier_probe_keeps_its_features_and_crop_and_says_so(encoder, capsys):
    earlier = Checkpoint("p.pth", {}, {"lr_grid": [0.5, 1.0], "pool": "avg"})
    images = torch.randn(4, 3, 32, 32)
    for given in (["--eval", "--resume", "p"], ["--global_pool"]):
        args = flags(*given, start=earlier)
        main_linprobe.keep_protocol(args)
        printed = capsys.readouterr().out
        assert printed.count("\n") == 1 and "the mean of the tokens after the encoder's final norm" in printed
        assert ("torchvision's random crops" in printed) == ("--eval" not in given)
        backbone = main_linprobe.load_backbone(args, encoder, SETUP, {})
        capsys.readouterr()
        tokens = backbone.forward_features(images)
        assert backbone.fc_norm is None
        assert torch.equal(pooled(backbone, images, "avg"), pool_tokens(tokens, 1, "avg"))
    train = main_linprobe.build_data(flags("--num_workers", 0, "--batch_size", 40, start=earlier), SETUP, {})[
        0
    ].dataset
    assert type(train.transform) is TorchvisionCrop
    main_linprobe.keep_protocol(flags("--cls_token", "--cached", start=earlier))
    assert capsys.readouterr().out.count("this probe") == 0, "nothing differs"
    with pytest.raises(ValueError, match=r"--weight_decay 0.1 had another form"):
        main_linprobe.keep_protocol(flags("--weight_decay", 0.1, start=earlier))


def test_a_new_probe_and_maes_file_follow_mae(capsys):
    stored = checkpoint.plain_flags(vars(flags()))
    maes = Checkpoint("m.pth", {}, {"model": "vit_base_patch16", "global_pool": True})
    for start in (None, maes, Checkpoint("p.pth", {}, stored)):
        args = flags("--num_workers", 0, "--batch_size", 40, start=start)
        main_linprobe.keep_protocol(args)
        assert capsys.readouterr().out == ""
        train = main_linprobe.build_data(args, SETUP, {})[0].dataset
        assert type(train.transform) is OneDrawCrop and train.transform.settings.scale == (0.08, 1.0)
        capsys.readouterr()
    assert type(pretrain_transform(8)) is TorchvisionCrop


# --- the centre crop ---


def transforms_of(args):
    """The transforms of the training and of the validation images; None for those that are not read."""
    loaders = main_linprobe.build_data(args, SETUP, {})[:2]
    return [loader and loader.dataset.transform for loader in loaders]


@pytest.mark.parametrize("given", [["--knn"], ["--cached"], []])
@pytest.mark.parametrize("share, cover", [(None, 36), (0.5, 64), (1, 32), (1.6, 20)])
def test_the_centre_crop_shows_a_share_of_the_image(capsys, given, share, cover):
    crop = [] if share is None else ["--crop_pct", share]
    args = flags("--num_workers", 0, "--batch_size", 40, *given, *crop)
    train, val = transforms_of(args)
    assert val.size == (32, 32) and val.cover == (cover, cover)
    if given:  # neighbours and cached features are those of whole images
        assert train.size == (32, 32) and train.cover == (cover, cover)
    else:
        assert type(train) is OneDrawCrop
    printed = capsys.readouterr().out
    assert ("centre crop" in printed) == (share is not None)
    assert share is None or f": centre crop 32x32 of {share:.3f}\n" in printed


def test_the_centre_crop_is_that_of_finetuning():
    """The same values are taken and refused, with the same words."""
    ours, theirs = (
        next(action for action in main.get_args_parser()._actions if action.dest == "crop_pct")
        for main in (main_linprobe, main_finetune)
    )
    assert ours.default is theirs.default is None
    for word in ("0.05", "0.9", "2", "0.04", "2.01", "nan", "x"):
        answers = []
        for action in (ours, theirs):
            try:
                answers.append(action.type(word))
            except argparse.ArgumentTypeError as error:
                answers.append(str(error))
        assert answers[0] == answers[1]


def test_a_probe_is_evaluated_on_the_crop_of_its_training(tmp_path, capsys, encoder):
    file = tmp_path / "e.pth"
    torch.save(encoder.to_dict(), file)
    common = ["--model", "vit_test", "--input_size", 32, "--batch_size", 40, "--num_workers", 0]
    common += ["--finetune", file, "--lr_grid", 1]
    out = tmp_path / "out"
    train = [*common, "--cached", "--epochs", 1, "--crop_pct", 0.5, "--output_dir", out]
    code, text = call(main_linprobe, capsys, *train)
    assert code == 0, text
    trained = re.findall(r"\* Acc@1 .*", text)
    last = ["--eval", "--resume", out / "checkpoint-last.pth"]
    code, text = call(main_linprobe, capsys, *common, *last)
    assert code == 0 and "centre crop 32x32 of 0.500" in text and "other than in training" not in text
    assert re.findall(r"\* Acc@1 .*", text) == trained
    code, text = call(main_linprobe, capsys, *common, *last, "--crop_pct", 1)
    assert code == 0 and "centre crop 32x32 of 1.000" in text and "crop_pct: 0.5 -> 1.0" in text
    for damaged in ("wide", 7, True, [0.9]):
        state = torch.load(out / "checkpoint-last.pth", weights_only=True)
        state["args"]["crop_pct"] = damaged
        torch.save(state, tmp_path / "damaged.pth")
        again = ["--eval", "--resume", tmp_path / "damaged.pth"]
        code, text = call(main_linprobe, capsys, *common, *again)
        assert code == 2 and "damaged.pth stores a damaged crop_pct" in text and "give --crop_pct" in text
        assert call(main_linprobe, capsys, *common, *again, "--crop_pct", 0.9)[0] == 0


# --- mistakes ---


@pytest.mark.parametrize(
    "given, facts",
    [
        (["--batch_size", 1], ["--batch_size 1", "2 images", "--batch_size 2 or more"]),
        (["--batch_size", 1, "--accum_iter", 4], ["--batch_size 2 or more"]),
        (["--batch_size", 1, "--cached"], ["--batch_size 2 or more"]),
    ],
)
def test_what_a_probe_cannot_take_is_one_line(tmp_path, capsys, given, facts):
    given = ["--finetune", "none", "--output_dir", tmp_path / "o", *given]
    code, text = call(main_linprobe, capsys, *given)
    error = [line for line in text.splitlines() if line.startswith("error")]
    assert code == 2 and len(error) == 1 and all(fact in error[0] for fact in facts), text
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("given", [[], ["--knn"], ["--cached"]])
def test_one_class_is_one_line(tmp_path, capsys, encoder, given):
    file = tmp_path / "e.pth"
    torch.save(encoder.to_dict(), file)
    for split in ("train", "val"):
        (tmp_path / "d" / split / "only").mkdir(parents=True)
        for i in range(4):
            image = tv.functional.to_pil_image(torch.rand(3, 8, 8))
            image.save(tmp_path / "d" / split / "only" / f"{i}.png")
    given = [*given, "--model", "vit_test", "--finetune", file, "--data_path", tmp_path / "d"]
    code, text = call(main_linprobe, capsys, *given, "--batch_size", 2, "--output_dir", "")
    (error,) = [line for line in text.splitlines() if line.startswith("error:")]
    assert (
        code == 2
        and "one class only (only)" in error
        and "two class folders" in error
        and "Traceback" not in text
    )


class Stream(torch.utils.data.IterableDataset):
    """Twelve grey images in three classes that differ a lot."""

    def set_epoch(self, epoch):
        pass

    def __len__(self):
        return 12

    def __iter__(self):
        return ((Image.new("RGB", (8, 8), (100 * (i % 3),) * 3), i % 3) for i in range(12))


def test_a_stream_serves_a_probe_and_neighbours_but_no_cache(tmp_path, capsys, encoder, monkeypatch):
    import timm.data

    monkeypatch.setattr(timm.data, "create_dataset", lambda *args, **options: Stream())
    file = tmp_path / "e.pth"
    torch.save(encoder.to_dict(), file)
    given = ["--model", "vit_test", "--finetune", file, "--data_path", "wds/x=/s", "--nb_classes", 3]
    given += ["--batch_size", 5, "--num_workers", 0, "--output_dir", "", "--epochs", 1, "--warmup_epochs", 0]
    code, text = call(main_linprobe, capsys, *given, "--knn")
    assert code == 0 and "k=10 100.000" in text and "12 training and 12 validation images" in text
    code, text = call(main_linprobe, capsys, *given)
    assert code == 0 and "on 12 of 12 images" in text, text
    for more, fact in (
        (["--cached"], "--cached keeps features"),
        (["--cache_data", "memory"], "--cache_data"),
    ):
        code, text = call(main_linprobe, capsys, *given, *more)
        (error,) = [line for line in text.splitlines() if line.startswith("error:")]
        assert code == 2 and fact in error and "wds/x=/s" in error
    code, text = call(main_linprobe, capsys, *given, "--nb_classes", 2)
    assert code == 2 and "has the label 2, and labels of 2 classes are 0 to 1: check --nb_classes" in text


def test_fewer_images_than_neighbours_are_all_taken(tmp_path, capsys, encoder):
    file = tmp_path / "e.pth"
    torch.save(encoder.to_dict(), file)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "d" / split / name).mkdir(parents=True)
            for i in range(4):
                image = tv.functional.to_pil_image(torch.rand(3, 8, 8))
                image.save(tmp_path / "d" / split / name / f"{i}.png")
    given = ["--knn", "--model", "vit_test", "--finetune", file, "--data_path", tmp_path / "d"]
    code, text = call(main_linprobe, capsys, *given, "--output_dir", "")
    lines = [line for line in text.splitlines() if "8 training images: kNN" in line]
    assert code == 0 and len(lines) == 1, text
    # All images of the two classes vote, whatever k is.
    (first, *_, last) = re.findall(r"k=\d+ ([\d.]+)", text.partition("kNN cls")[2].splitlines()[0])
    assert first == last


def test_heads_are_used_with_the_encoder_that_they_were_trained_on(tmp_path, capsys, encoder):
    file, copy, other = (tmp_path / name for name in ("e.pth", "copy.pth", "other.pth"))
    for path, weights in ((file, encoder.model), (copy, encoder.model)):
        torch.save({"model": weights, "args": encoder.args}, path)
    changed = {name: weight + (name == "blocks.1.mlp.fc2.bias") for name, weight in encoder.model.items()}
    torch.save({"model": changed, "args": encoder.args}, other)
    common = ["--model", "vit_test", "--input_size", 32, "--batch_size", 40, "--cached", "--lr_grid", 1]
    train = [*common, "--output_dir", tmp_path / "out"]
    assert call(main_linprobe, capsys, *train, "--epochs", 1, "--finetune", file)[0] == 0
    again = ["--eval", "--resume", tmp_path / "out" / "checkpoint-last.pth"]
    for words in ([*train, "--epochs", 2], [*common, *again]):
        code, text = call(main_linprobe, capsys, *words, "--finetune", other)
        assert code == 2 and f"another encoder than {other}" in text, text
        assert f"trained on ({file})" in text or f"trained on ({copy})" in text
        # The same weights in another file, at another size of images.
        code, text = call(main_linprobe, capsys, *words, "--finetune", copy)
        assert code == 0 and "not read" not in text, text
    code, text = call(main_linprobe, capsys, *common, *again)
    assert code == 2 and f"--finetune FILE (it was {copy})" in text
    # Other positions count at the same size of images only.
    positions = {**encoder.model, "pos_embed": encoder.model["pos_embed"] + 1}
    torch.save({"model": positions, "args": encoder.args}, copy)
    code, text = call(main_linprobe, capsys, *common, *again, "--finetune", copy)
    assert code == 2 and "that file, or --pos_embed, has changed since" in text
    code, text = call(main_linprobe, capsys, *common, *again, "--finetune", copy, "--input_size", 48)
    assert code == 0, text


def test_a_token_that_the_file_lacks_is_the_same_at_each_start():
    words = ["--model", "deit_pico_distilled_patch8", "--finetune", "F"]
    args = main_linprobe.as_trained(parse(main_linprobe.get_args_parser(), words), None)
    pico = Checkpoint("p.pth", MODELS["mae_vit_pico_patch8"](img_size=(32, 32)).state_dict(), {})
    first = main_linprobe.load_backbone(args, pico, SETUP, {})
    second = main_linprobe.load_backbone(args, pico, SETUP, {})
    assert torch.equal(first.dist_token, second.dist_token) and first.dist_token.std() > 0
    sums = [check_encoder(each, None, "p.pth", SETUP.size) for each in (first, second)]
    assert sums[0] == sums[1]


@pytest.mark.parametrize("folder", ["empty", "absent"])
def test_a_class_without_validation_images_is_probed(tmp_path, capsys, monkeypatch, encoder, folder):
    """Its output competes. The mean over classes is scikit-learn's, for the best head and for each k."""
    metrics = pytest.importorskip("sklearn.metrics")
    counts = {"train": {"a": 8, "b": 8, "c": 8}, "val": {"b": 9, "c": 3}}
    if folder == "empty":
        (tmp_path / "d" / "val" / "a").mkdir(parents=True)
    torch.manual_seed(0)
    for split, classes in counts.items():
        for name, count in classes.items():
            (tmp_path / "d" / split / name).mkdir(parents=True)
            for i in range(count):
                image = tv.functional.to_pil_image(torch.rand(3, 8, 8) * (0.8 + 0.1 * (name == "b")))
                image.save(tmp_path / "d" / split / name / f"{i}.png")
    torch.save(encoder.to_dict(), tmp_path / "e.pth")
    common = ["--model", "vit_test", "--finetune", tmp_path / "e.pth", "--data_path", tmp_path / "d"]
    common += ["--batch_size", 5, "--lr_grid", 0.5, 1]
    seen = []

    def record(logits, label, recalls, head):
        seen.append((head, label, logits.argmax(1)))
        return original(logits, label, recalls, head)

    original = main_linprobe.classification
    monkeypatch.setattr(main_linprobe, "classification", record)
    code, text = call(main_linprobe, capsys, *common, "--cached", "--output_dir", tmp_path / "run")
    missing = "2 of 3 classes have validation images: no accuracy for a\n"
    assert code == 0 and text.count(missing) == 1, text
    logged = json.loads((tmp_path / "run" / "log.txt").read_text())
    best = int(logged["test_acc1_lr1"] > logged["test_acc1_lr0.5"])
    label, answer = (torch.cat([batch[part] for batch in seen if batch[0] == best]) for part in (1, 2))
    assert sorted(label.tolist()) == [1] * 9 + [2] * 3, "numbered as in training"
    recall = [(answer[label == c] == c).double().mean().item() for c in (1, 2)]
    assert logged["test_balanced_acc1"] == pytest.approx(50 * sum(recall))
    (line,) = [line for line in text.splitlines() if line.startswith("* Acc@1")]
    assert f" balanced {50 * sum(recall):.3f} (2 of 3 classes) linear probe at lr" in line
    code, text = call(
        main_linprobe, capsys, *common, "--eval", "--resume", tmp_path / "run" / "checkpoint-last.pth"
    )
    assert code == 0 and text.count(missing) == 1 and line in text, text

    found = []

    def remember(queries, labels, *args):
        found.append((labels, knn_correct(queries, labels, *args)))
        return found[-1][1]

    knn_correct = main_linprobe.knn_correct
    monkeypatch.setattr(main_linprobe, "knn_correct", remember)
    code, text = call(main_linprobe, capsys, *common, "--knn", "--output_dir", tmp_path / "knn")
    assert code == 0 and text.count(missing) == 1, text
    logged = json.loads((tmp_path / "knn" / "log.txt").read_text())
    for pool, (labels, correct) in zip(("cls", "avg"), found, strict=True):
        for k, right in correct.items():
            # Any other class is as wrong as the third one.
            answers = torch.where(right, labels, 3 - labels)
            expected = metrics.balanced_accuracy_score(labels, answers)
            assert logged[f"balanced_knn{k}_{pool}"] == pytest.approx(100 * expected), (pool, k)
            assert logged[f"knn{k}_{pool}"] == pytest.approx(100 * right.double().mean().item())
            figures = f"k={k} {logged[f'knn{k}_{pool}']:.3f} balanced {100 * expected:.3f} (2 of 3 classes)"
            assert figures in text
    assert "(24 training and 12 validation images; " in text


def test_a_probe_is_not_evaluated_on_classes_that_it_does_not_know(tmp_path, capsys, encoder):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "d" / split / name).mkdir(parents=True)
            for i in range(4):
                tv.functional.to_pil_image(torch.rand(3, 8, 8)).save(
                    tmp_path / "d" / split / name / f"{i}.png"
                )
    torch.save(encoder.to_dict(), tmp_path / "e.pth")
    common = ["--model", "vit_test", "--finetune", tmp_path / "e.pth", "--data_path", tmp_path / "d"]
    common += ["--batch_size", 4, "--cached", "--output_dir", tmp_path / "run"]
    assert call(main_linprobe, capsys, *common)[0] == 0
    (tmp_path / "d" / "val" / "b").rename(tmp_path / "d" / "val" / "x")
    resume = ["--eval", "--resume", tmp_path / "run" / "checkpoint-last.pth"]
    code, text = call(main_linprobe, capsys, *common, *resume)
    assert code == 2 and "was trained on the classes a, b, the data have a, x" in text, text
    # Heads without names of classes: the training images have as many.
    state = torch.load(tmp_path / "run" / "checkpoint-last.pth", weights_only=True)
    del state["classes"]
    torch.save(state, tmp_path / "unnamed.pth")
    for file in (tmp_path / "d" / "val" / "x").iterdir():
        file.unlink()
    (tmp_path / "d" / "val" / "x").rmdir()
    code, text = call(main_linprobe, capsys, *common, "--eval", "--resume", tmp_path / "unnamed.pth")
    assert code == 0 and "1 of 2 classes has validation images: no accuracy for b" in text, text
