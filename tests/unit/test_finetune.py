"""Pretrained encoders become classifiers: loading, losses, groups, probes and neighbours."""

import csv
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import main_finetune
import main_linprobe
import tiny  # registers mae_test and vit_test
from backbones.registry import build_classifier, freeze_all_but
from backbones.teacher import build_teacher
from commands import accuracy, call
from layers.pos_embed import resize_pos_embed, sincos_2d
from layers.probe import Probe, pooled
from models_mae_pl import MODELS, MaskedAutoencoderViT
from models_vit import DEIT_DISTILLED
from util.data.pixels import Pixels
from util.evaluate.accuracy import Recalls, classification
from util.evaluate.knn import knn_correct, knn_votes, nearest
from util.evaluate.supervised import make_eval_fn
from util.flags.groups import IMAGENET_MEAN, IMAGENET_STD
from util.flags.parser import parse
from util.train.lr_sched import set_lr
from util.train.optim import lars, param_groups
from util.train.setup import Setup
from util.train.supervised import BatchAugmentation, Erasing, Mixing, SupervisedLoss
from util.weights import transfer
from util.weights.types import Checkpoint

SETUP = Setup(torch.device("cpu"), "fp32", (64, 64), Pixels(IMAGENET_MEAN, IMAGENET_STD))


def make_pretrained(**kwargs) -> tuple[MaskedAutoencoderViT, Checkpoint]:
    torch.manual_seed(1)
    model = MODELS["mae_test"](**({"img_size": (32, 32)} | kwargs))
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.02)
    return model, Checkpoint("x.pth", model.state_dict(), {"model": "mae_test"})


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_the_encoder_is_taken_over(pool):
    mae, state = make_pretrained(pos_label="apl")
    vit = build_classifier("vit_test", img_size=(32, 32), num_classes=5, pool=pool, pos_label="apl")
    note = transfer.init_encoder(vit, state, "zero")
    assert "a new one, zero" in note and vit.pos_embed.abs().sum() == 0 and vit.pos_embed.requires_grad
    images, cells = torch.randn(2, 3, 32, 32), torch.arange(16).expand(2, -1)
    expected = mae.forward_encoder(images, cells)  # without an embedding, as pretrained
    tokens = vit.forward_features(images)
    assert torch.allclose(tokens if pool == "cls" else vit.fc_norm(tokens), expected, atol=1e-5)
    # the label head continues where it was
    position = vit(images, positions=True)[1]["position"]
    assert torch.allclose(position, mae.pos_head(expected[:, 1:], cells)["position"], atol=1e-5)
    for name, p in vit.named_parameters():
        if name in state.model:
            assert torch.equal(p, state.model[name]), name


def test_a_new_norm_is_maes_where_no_label_head_goes_on():
    _, state = make_pretrained(pos_label="apl")
    vit = build_classifier("vit_test", img_size=(32, 32), num_classes=5)
    assert "new: fc_norm, head" in transfer.init_encoder(vit, state, "zero")
    assert (vit.fc_norm.weight == 1).all() and (vit.fc_norm.bias == 0).all()


@pytest.mark.parametrize("init", ["zero", "sincos", "normal"])
def test_the_positional_embedding_that_comes_back(init):
    _, state = make_pretrained()
    vit = build_classifier("vit_test", img_size=(32, 32), num_classes=5)
    transfer.init_encoder(vit, state, init)
    table = vit.pos_embed.detach()
    if init == "sincos":
        assert torch.equal(table, sincos_2d(32, (4, 4)))
    else:
        assert table.std() == pytest.approx(0.02 if init == "normal" else 0.0, rel=0.15)


def test_a_fixed_positional_embedding_is_not_made_zero():
    _, state = make_pretrained()
    vit = build_classifier("vit_test", img_size=(32, 32), num_classes=5, pos_embed="sincos")
    assert "the fixed sine-cosine one" in transfer.init_encoder(vit, state, "zero")
    assert torch.equal(vit.pos_embed.data, sincos_2d(32, (4, 4)))


def test_another_grid_is_interpolated_by_size():
    _, state = make_pretrained(pos_embed="sincos", img_size=(32, 48))
    state.args |= {"input_size": [32, 48], "patch_size": [8]}
    vit = build_classifier("vit_test", img_size=(40, 56), num_classes=5)
    note = transfer.init_encoder(vit, state, "zero")
    assert "resized from (4, 6) to (5, 7)" in note
    assert torch.equal(vit.pos_embed.data, resize_pos_embed(sincos_2d(32, (4, 6)), (4, 6), (5, 7)))
    # against the obvious form, one channel at a time
    cells = sincos_2d(32, (4, 6))[0, 1:].reshape(4, 6, 32)
    for c in (0, 9, 31):
        one = F.interpolate(cells[None, None, :, :, c], size=(5, 7), mode="bicubic")[0, 0]
        assert torch.allclose(vit.pos_embed[0, 1:, c].reshape(5, 7), one, atol=1e-6)


@pytest.mark.parametrize("old, new", [(3, 1), (3, 3), (3, 5), (1, 3), (1, 4), (4, 1), (4, 3), (2, 7)])
def test_other_channels_answer_the_same_to_grey_images(old, new):
    from timm.models import adapt_input_conv

    weight = torch.randn(2, old, 4, 4)
    adapted = transfer.adapt_channels(weight, new)
    assert adapted.shape == (2, new, 4, 4)
    if old == 3:
        assert torch.allclose(adapted, adapt_input_conv(new, weight)), "timm's"
    elif new == 1 or new % old == 0:
        grey = torch.randn(1, 1, 4, 4)
        assert torch.allclose(
            F.conv2d(grey.expand(-1, new, -1, -1), adapted),
            F.conv2d(grey.expand(-1, old, -1, -1), weight),
            atol=1e-5,
        )


def test_a_label_head_goes_on_whole_or_starts_anew():
    """Layers behind one that does not fit start anew, too. A classifier may be of another grid."""
    mae = MODELS["mae_test"](img_size=(32, 32), pos_label="apl+rpl", pos_tokens="full")
    state = Checkpoint("x.pth", mae.state_dict(), {"model": "mae_test"})
    for tokens, size, kept in (
        ("half", 32, ()),
        ("full", 48, ("fc1.", "fc2.")),
        ("full", 32, ("fc1.", "fc2.", "classifier.")),
    ):
        vit = build_classifier(
            "vit_test", img_size=(size, size), num_classes=5, pos_label="apl+rpl", pos_tokens=tokens
        )
        before = {k: v.clone() for k, v in vit.state_dict().items()}
        transfer.init_encoder(vit, state, "zero")
        for k, v in vit.state_dict().items():
            if k.startswith("pos_head."):
                expected = state.model if k.split(".", 2)[2].startswith(kept) else before
                assert torch.equal(v, expected[k]), k


@pytest.mark.parametrize("pos_embed", ["none", "sincos"])
def test_a_pretrained_encoder_in_deit_with_its_second_token(pos_embed):
    mae = MODELS["mae_test"](img_size=(32, 32), pos_embed=pos_embed)
    state = Checkpoint("x.pth", mae.state_dict(), {"model": "mae_test"})
    deit = DEIT_DISTILLED(img_size=(32, 32), num_classes=5, **tiny.ENCODER)
    transfer.init_encoder(deit, state, "zero")
    if pos_embed == "sincos":
        own, theirs = deit.pos_embed[0], mae.pos_embed[0]
        assert torch.equal(own[0], theirs[0]) and torch.equal(own[2:], theirs[1:]) and not own[1].any()
    new = {"dist_token"} | ({"pos_embed"} if pos_embed == "none" else set())
    assert transfer.new_parameters(state) >= new
    freeze_all_but(deit, 0, transfer.new_parameters(state))
    learning = {n for n, p in deit.named_parameters() if p.requires_grad}
    assert (
        new <= learning and "cls_token" not in learning and ("pos_embed" in learning) == ("pos_embed" in new)
    )


def test_channels_are_adapted_as_timm_does():
    _, state = make_pretrained()
    vit = build_classifier("vit_test", img_size=(32, 32), in_chans=1, num_classes=5)
    assert "adapted from 3 to 1 channels" in transfer.init_encoder(vit, state, "zero")
    expected = state.model["patch_embed.proj.weight"].sum(1, keepdim=True)
    assert torch.allclose(vit.patch_embed.proj.weight, expected)


def test_wrong_kinds_of_checkpoint_name_the_right_flag(tmp_path, capsys):
    path = str(tmp_path / "c.pth")
    _, state = make_pretrained()
    torch.save(state.to_dict(), path)
    code, text = call(main_finetune, capsys, "--model", "vit_test", "--eval", "--resume", path)
    assert (
        code == 2
        and "it is for main_pretrain.py --resume or --init_from; main_segment.py, main_finetune" in text
    )
    code, text = call(
        main_finetune,
        capsys,
        "--model",
        "vit_tiny_patch8",
        "--finetune",
        path,
        "--output_dir",
        tmp_path / "b",
    )
    assert code == 2 and "does not fit --model" in text and "made with --model mae_test" in text
    torch.save({"model": {"conv1.weight": torch.ones(1)}}, path)
    code, text = call(
        main_finetune, capsys, "--model", "vit_test", "--finetune", path, "--output_dir", tmp_path / "c"
    )
    assert code == 2 and "no command here knows (it has conv1.weight)" in text
    code, text = call(main_finetune, capsys, "--model", "vit_test", "--eval")
    assert code == 2 and "--eval needs --resume" in text
    code, text = call(
        main_finetune, capsys, "--model", "vit_test", "--nb_classes", 12, "--output_dir", tmp_path / "d"
    )
    assert code == 2 and "--nb_classes 12, but" in text and "has 10 class folders" in text
    code, text = call(
        main_finetune,
        capsys,
        "--model",
        "vit_test",
        "--mixup",
        0.8,
        "--batch_size",
        25,
        "--output_dir",
        tmp_path / "e",
    )
    assert code == 2 and "even --batch_size" in text


def test_mixup_mixes_class_targets_only():
    torch.manual_seed(0)
    np.random.seed(0)
    augment = BatchAugmentation(5, 0.1, Erasing(), Mixing(mixup=0.8), torch.device("cpu"))
    with pytest.raises(ValueError, match="mixup and cutmix need an even `batch_size`, found 3"):
        augment.check(3)
    vit = build_classifier("vit_test", img_size=(32, 32), num_classes=5, pos_label="apl")
    seen = {}
    vit.pos_head.register_forward_pre_hook(lambda m, inputs: seen.update(inputs=inputs))
    loss_fn = SupervisedLoss(augment, 0.1, positions=True, pos_weight=0.25)
    batch = {"image": torch.randn(4, 3, 32, 32), "label": torch.tensor([0, 1, 2, 3])}
    np.random.seed(3)
    loss, terms = loss_fn(vit, batch)
    assert len(seen["inputs"]) == 1, "no cells are given: all of them in order, nothing mixed"
    np.random.seed(3)
    x, target = augment(batch["image"].clone(), batch["label"])
    assert ((target > 0.02) & (target < 0.9)).any(), "the draw mixes"
    by_hand = -(target * vit(x).log_softmax(-1)).sum(-1).mean()
    assert torch.allclose(terms["class"], by_hand, atol=1e-5)
    assert torch.allclose(loss, terms["class"] + 0.25 * terms["position"])


def test_distillation_learns_the_teachers_answer():
    torch.manual_seed(0)
    student = DEIT_DISTILLED(
        img_size=(32, 32), patch_size=(8, 8), dim=32, depth=1, num_heads=2, num_classes=5
    )
    for head in (student.head, student.head_dist):
        torch.nn.init.normal_(head.weight)
    answers = torch.tensor([4, 0, 2])
    loss_fn = SupervisedLoss(lambda x, y: (x, y), teacher=lambda x: F.one_hot(answers, 5).float())
    batch = {"image": torch.randn(3, 3, 32, 32), "label": torch.tensor([1, 2, 3])}
    loss, terms = loss_fn(student, batch)
    own, distilled = student(batch["image"], distillation=True)
    assert torch.allclose(terms["class"], F.cross_entropy(own, batch["label"]))
    assert torch.allclose(terms["distill"], F.cross_entropy(distilled, answers))
    assert torch.allclose(loss, (terms["class"] + terms["distill"]) / 2)


def test_a_pretrained_teacher_sees_its_own_normalisation(monkeypatch):
    from backbones import timm

    class Fake(torch.nn.Module):
        num_classes, pretrained_cfg = 5, {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.5)}

        def forward(self, x):
            self.seen = x
            return x

    monkeypatch.setattr(timm, "published_model", lambda name: Fake())
    pixels, mean, std = torch.rand(2, 3, 4, 4), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    shape = (3, 1, 1)
    options = dict(img_size=(4, 4), in_chans=3, mean=mean, std=std)
    teacher = build_teacher("timm/x", "", classes=list("abcde"), **options)
    out = teacher((pixels - torch.tensor(mean).reshape(shape)) / torch.tensor(std).reshape(shape))
    expected = (pixels - torch.tensor((0.5, 0.4, 0.3)).reshape(shape)) / torch.tensor(
        (0.2, 0.25, 0.5)
    ).reshape(shape)
    assert torch.allclose(out, expected, atol=1e-5)
    with pytest.raises(ValueError, match="knows 5 classes, the data have 7"):
        build_teacher("timm/x", "", classes=list("abcdefg"), **options)


def test_layer_decay_groups_equal_timms():
    timm_optim = pytest.importorskip("timm.optim")
    timm = pytest.importorskip("timm")
    ours = build_classifier("vit_test", img_size=(32, 32), num_classes=5, pos_label="none")
    theirs = timm.create_model(
        "vit_base_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=5,
        global_pool="avg",
    )
    names = {id(p): n for n, p in theirs.named_parameters()}
    expected = {
        names[id(p)]: (g["lr_scale"], g["weight_decay"])
        for g in timm_optim.param_groups_layer_decay(
            theirs, weight_decay=0.05, layer_decay=0.75, no_weight_decay_list=theirs.no_weight_decay()
        )
        for p in g["params"]
    }
    names = {id(p): n for n, p in ours.named_parameters()}
    groups = param_groups(ours, 0.05, ours.no_weight_decay(), 0.75, ours.layer_id, ours.num_layers)
    found = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name] == pytest.approx(expected[name]), name


def test_partial_fine_tuning_trains_the_last_blocks_and_heads():
    vit = build_classifier("vit_test", img_size=(32, 32), num_classes=5, pos_label="apl")
    freeze_all_but(vit, 1)
    trained = {
        n.split(".")[0] + ("." + n.split(".")[1] if n.startswith("blocks") else "")
        for n, p in vit.named_parameters()
        if p.requires_grad
    }
    assert trained == {"blocks.1", "fc_norm", "head", "pos_head"}
    freeze_all_but(vit, 0)
    assert not any(p.requires_grad for p in vit.blocks.parameters()) and vit.head.weight.requires_grad


def folders(root, names, copies=2):
    """A validation set of noise with these class folders; a later class is brighter."""
    rng = np.random.default_rng(len(names))
    for c, name in enumerate(names):
        (root / "val" / name).mkdir(parents=True)
        for i in range(copies):
            Image.fromarray(rng.integers(c, 200 + c, (32, 32, 3), dtype=np.uint8)).save(
                root / "val" / name / f"{i}.png"
            )
    return root


def answers(file) -> dict[str, tuple[str, float]]:
    with open(file) as f:
        return {row["image"]: (row["prediction"], float(row["probability"])) for row in csv.DictReader(f)}


def by_hand(model, outputs: list[str], data: list[str], images) -> dict[str, tuple[str, float]]:
    """The most probable class of `data` for each image, among the outputs that are named like them."""
    found = {}
    for path in sorted(images.rglob("*.png")):
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255
        x = (pixels - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
        with torch.no_grad():
            logits = model(x[None])[0]
        p = {name: float(logits[outputs.index(name)].exp()) for name in data}
        best = max(p, key=p.get)
        found[str(path.relative_to(images))] = best, p[best] / sum(p.values())
    return found


@pytest.mark.parametrize("stored", [True, False])
def test_evaluation_on_some_of_the_classes(tmp_path, capsys, stored):
    """As ImageNet-A and -R have 200 of ImageNet's classes: the answer is the best of the data's."""
    known = ["owl", "bee", "cat", "ant", "dog"]  # in an order that is not alphabetical
    torch.manual_seed(0)
    vit = build_classifier("vit_test", img_size=(32, 32), num_classes=5, head_init_std=1.0).eval()
    state = {"model": vit.state_dict(), "args": {"model": "vit_test"}} | (
        {"classes": known} if stored else {}
    )
    torch.save(state, tmp_path / "c.pth")
    data = folders(tmp_path / "data", ["bee", "cat", "owl"])
    flags = [
        "--model",
        "vit_test",
        "--eval",
        "--resume",
        tmp_path / "c.pth",
        "--data_path",
        data,
        "--crop_pct",
        1,
        "--predictions",
        tmp_path / "p.csv",
    ]
    code, text = call(main_finetune, capsys, *flags)
    if not stored:
        assert (
            code == 2
            and "distinguishes 5 classes, and there are 3 in the data" in text
            and "by --classes" in text
        )
        (tmp_path / "names.txt").write_text("# of the outputs\n" + "\n".join(known) + "\n")
        code, text = call(
            main_finetune, capsys, *flags, "--classes", tmp_path / "names.txt", "--nb_classes", 5
        )
    assert code == 0 and "3 of the model's 5 classes" in text, text
    found, expected = answers(tmp_path / "p.csv"), by_hand(vit, known, ["bee", "cat", "owl"], data / "val")
    assert {k: v[0] for k, v in found.items()} == {k: v[0] for k, v in expected.items()}
    assert all(found[k][1] == pytest.approx(expected[k][1], abs=2e-4) for k in expected)
    assert float(accuracy(text)[0]) == pytest.approx(
        100 * np.mean([k.startswith(v[0]) for k, v in expected.items()]), abs=1e-3
    )
    folders(tmp_path / "more", ["bee", "elk"])
    code, text = call(
        main_finetune,
        capsys,
        *flags,
        "--data_path",
        tmp_path / "more",
        *([] if stored else ["--classes", data]),
    )
    problem = (
        "knows owl, bee, cat, ant, dog, and the data have elk"
        if stored
        else "5 classes, and there are 3 given"
    )
    assert code == 2 and problem in text


def test_folders_with_numbers_are_not_taken_in_the_order_of_strings(tmp_path, capsys):
    """ImageNet-V2's folders are called 0 to 999, which sort as 0, 1, 10, 100."""
    vit = build_classifier("vit_test", img_size=(32, 32), num_classes=12, head_init_std=1.0)
    torch.save({"model": vit.state_dict()}, tmp_path / "c.pth")
    data = folders(tmp_path / "data", [str(i) for i in range(12)])
    flags = ["--model", "vit_test", "--eval", "--resume", tmp_path / "c.pth", "--data_path", data]
    code, text = call(main_finetune, capsys, *flags)
    assert (
        code == 2 and "which folders sort as 0, 1, 10, 11, 2, ... (12 in all)" in text and "--classes" in text
    )
    (tmp_path / "names.txt").write_text("\n".join(str(i) for i in range(12)))
    code, text = call(
        main_finetune,
        capsys,
        *flags,
        "--classes",
        tmp_path / "names.txt",
        "--predictions",
        tmp_path / "p.csv",
        "--crop_pct",
        1,
    )
    expected = by_hand(vit.eval(), [str(i) for i in range(12)], [str(i) for i in range(12)], data / "val")
    assert code == 0 and {k: v[0] for k, v in answers(tmp_path / "p.csv").items()} == {
        k: v[0] for k, v in expected.items()
    }


def test_imagenets_names_are_known(tmp_path, capsys):
    """MAE's released classifiers store no names; a folder of some wnids is evaluated all the same."""
    from timm.data import ImageNetInfo

    known, data = ImageNetInfo("imagenet-1k").label_names(), ["n01498041", "n01531178", "n12144580"]
    vit = build_classifier("vit_test", img_size=(32, 32), num_classes=1000, head_init_std=1.0).eval()
    torch.save({"model": vit.state_dict()}, tmp_path / "c.pth")
    folders(tmp_path / "data", data)
    code, text = call(
        main_finetune,
        capsys,
        "--model",
        "vit_test",
        "--eval",
        "--resume",
        tmp_path / "c.pth",
        "--data_path",
        tmp_path / "data",
        "--crop_pct",
        1,
        "--predictions",
        tmp_path / "p.csv",
        "--nb_classes",
        1000,
    )
    assert code == 0 and "3 of the model's 1000 classes" in text, text
    found, expected = answers(tmp_path / "p.csv"), by_hand(vit, known, data, tmp_path / "data" / "val")
    assert {k: v[0] for k, v in found.items()} == {k: v[0] for k, v in expected.items()}


def test_evaluation_counts_by_hand():
    torch.manual_seed(0)
    logits, label = torch.randn(12, 8), torch.randint(0, 8, (12,))
    label[3] = -1  # unreadable
    loss, terms = make_eval_fn(False)(lambda x: logits, {"image": torch.zeros(12), "label": label})
    keep = label >= 0
    top5 = logits.topk(5, dim=1).indices
    assert terms["images"] == 11
    assert terms["acc1"].item() == pytest.approx(
        100 * (logits.argmax(1) == label)[keep].float().mean().item(), rel=1e-5
    )
    assert terms["acc5"].item() == pytest.approx(
        100 * (top5 == label[:, None]).any(1)[keep].float().mean().item(), rel=1e-5
    )
    assert loss.item() == pytest.approx(F.cross_entropy(logits[keep], label[keep]).item(), rel=1e-5)


def test_equal_logits_are_no_right_answers_for_every_class():
    """bf16 has few values, so logits tie. The prediction is argmax's first class; nan is never right."""
    torch.manual_seed(0)
    logits, label = torch.randint(0, 3, (500, 8)).bfloat16(), torch.randint(0, 8, (500,))
    acc1 = classification(logits, label)[1]["acc1"].item()
    assert acc1 == pytest.approx(100 * logits.argmax(1).eq(label).float().mean().item())
    assert (
        acc1 < 100 * (logits == logits.amax(1, keepdim=True)).gather(1, label[:, None]).float().mean() - 20
    ), "many ties"
    assert classification(torch.zeros(8, 8), torch.arange(8))[1]["acc5"].item() == 62.5
    broken = torch.full((8, 8), float("nan"))
    assert [classification(broken, torch.arange(8))[1][k].item() for k in ("acc1", "acc5")] == [0, 0]
    broken = torch.eye(8)
    broken[:, 0] = float("nan")
    assert classification(broken, torch.arange(8))[1]["acc1"].item() == 0


def test_the_mean_over_classes_is_scikit_learns():
    """Unequal classes, one of them without images, unreadable images, equal logits, and two heads."""
    metrics = pytest.importorskip("sklearn.metrics")
    torch.manual_seed(0)
    label = torch.tensor([0, 1, 3, 4])[torch.multinomial(torch.tensor([0.7, 0.2, 0.08, 0.02]), 400, True)]
    logits = torch.randint(0, 3, (2, 400, 5)).bfloat16() + F.one_hot(label, 5) * torch.rand(400, 1).round()
    label[::7] = -1
    recalls = Recalls(5, torch.device("cpu"), heads=2)
    for batch in torch.arange(400).split(48):
        for head in range(2):
            classification(logits[head, batch], label[batch], recalls, head)
    recalls.reduce()
    keep = label >= 0
    for head, (mean, share) in enumerate(zip(recalls.balanced(), recalls.accuracies())):
        answer = logits[head].argmax(1)
        recall = [(answer == c)[label == c].double().mean().item() for c in (0, 1, 3, 4)]
        assert mean.accuracy == pytest.approx(100 * np.mean(recall), rel=1e-12)
        with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
            oracle = metrics.balanced_accuracy_score(label[keep], answer[keep])
        assert mean.accuracy == pytest.approx(100 * oracle, rel=1e-12) and (mean.seen, mean.classes) == (4, 5)
        assert share == pytest.approx(100 * (answer == label)[keep].double().mean().item(), rel=1e-12)
        assert str(mean) == f"balanced {mean.accuracy:.3f} (4 of 5 classes)"
        assert abs(mean.accuracy - share) > 1, "the classes are not equally frequent"
    assert recalls.images == keep.sum()
    assert Recalls(1, torch.device("cpu")).balanced() == [], "one class has no mean over classes"


def shades(root, train: dict[str, int], val: dict[str, int]):
    """Class folders with these numbers of grey images; a later class is brighter."""
    names = sorted(train | val)
    for split, counts in (("train", train), ("val", val)):
        for name, count in counts.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                grey = np.full((32, 32, 3), 40 + 60 * names.index(name) + 2 * i, np.uint8)
                Image.fromarray(grey).save(root / split / name / f"{i}.png")
    return root


def evaluation_line(text: str) -> str:
    return [line for line in text.splitlines() if line.startswith("* Acc@1")][-1]


def balanced_of(file) -> float:
    """The mean over classes of a table of predictions, in percent."""
    metrics = pytest.importorskip("sklearn.metrics")
    with open(file) as f:
        rows = list(csv.DictReader(f))
    label, answer = [row["label"] for row in rows], [row["prediction"] for row in rows]
    # A class without images is no class of these labels.
    names = sorted({*label, *answer})
    matrix = metrics.confusion_matrix(label, answer, labels=names)
    return 100 * float(
        np.mean([matrix[i, i] / matrix[i].sum() for i in range(len(names)) if matrix[i].any()])
    )


@pytest.mark.parametrize("folder", ["empty", "absent"])
def test_a_class_without_validation_images_trains(tmp_path, capsys, folder):
    """Its output competes in training and in --eval, whether or not its folder is there."""
    val = {"b": 6, "c": 2} | ({"a": 0} if folder == "empty" else {})
    data = shades(tmp_path / "data", {"a": 4, "b": 4, "c": 4}, val)
    common = ["--model", "vit_test", "--data_path", data, "--batch_size", 4, "--crop_pct", 1]
    common += ["--predictions", tmp_path / "p.csv"]
    train = [*common, "--lr", 0, "--output_dir", tmp_path / "run"]
    code, text = call(main_finetune, capsys, *train)
    assert code == 0, text
    assert text.count("2 of 3 classes have validation images: no accuracy for a\n") == 1, text
    last = tmp_path / "run" / "checkpoint-last.pth"
    state = torch.load(last, weights_only=True)
    assert state["classes"] == ["a", "b", "c"] and state["model"]["head.bias"].shape == (3,)
    # A head whose answer is a for some images.
    torch.manual_seed(3)
    torch.nn.init.normal_(state["model"]["head.weight"])
    torch.save(state, last)
    code, text = call(main_finetune, capsys, *train, "--epochs", 2)
    logged = json.loads((tmp_path / "run" / "log.txt").read_text().splitlines()[-1])
    assert code == 0 and logged["test_balanced_acc1"] == pytest.approx(balanced_of(tmp_path / "p.csv"))
    line = evaluation_line(text)
    assert f" balanced {logged['test_balanced_acc1']:.3f} (2 of 3 classes) " in line
    assert "on 8 of 8 images" in line
    rows = answers(tmp_path / "p.csv")
    assert "a" in {answer for answer, _ in rows.values()}, "or nothing would be tested here"
    unnamed = torch.load(last, weights_only=True)
    del unnamed["classes"]
    torch.save(unnamed, tmp_path / "unnamed.pth")
    for more in (["--resume", last], ["--resume", tmp_path / "unnamed.pth"]):
        for given in ([], ["--classes", data]):
            code, text = call(main_finetune, capsys, *common, "--eval", *more, *given)
            assert code == 0 and evaluation_line(text) == line, text
            assert text.count("2 of 3 classes have validation images: no accuracy for a\n") == 1, text
            assert answers(tmp_path / "p.csv") == rows
    # Without the training images these are other data, and the answer is the best of their classes.
    (data / "train").rename(data / "other")
    code, text = call(main_finetune, capsys, *common, "--eval", "--resume", last)
    is_best_of_two = "2 of the model's 3 classes" in text
    assert code == 0 and is_best_of_two == (folder == "absent"), text
    assert (evaluation_line(text) == line) == (folder == "empty")


def test_a_validation_class_that_training_lacks_is_an_error(tmp_path, capsys):
    data = shades(tmp_path / "data", {"a": 2, "b": 2}, {"a": 2, "x": 2})
    common = ["--model", "vit_test", "--data_path", data, "--batch_size", 2, "--output_dir", tmp_path / "run"]
    code, text = call(main_finetune, capsys, *common)
    assert code == 2 and "only in training: b; only in validation: x" in text, text
    (data / "val" / "x").rename(data / "val" / "b")
    (data / "train" / "c").mkdir()
    code, text = call(main_finetune, capsys, *common)
    assert code == 2 and "class folders without images" in text and "train: c. Remove or fill them" in text


@pytest.mark.parametrize("name", ["swin_pico", "timm/vit_tiny_patch16_224", "timm/resnet10t"])
def test_classifiers_with_positions_of_their_own_are_probed_without_more_flags(name):
    model = build_classifier(name, img_size=(64, 64), num_classes=5).eval()
    flags = {"model": name, "pos_embed": "learned", "pool": None, "patch_size": None}
    state = Checkpoint("x.pth", model.state_dict(), flags)
    args = parse(main_linprobe.get_args_parser(), ["--model", name, "--finetune", "x.pth"])
    backbone, images = (
        main_linprobe.load_backbone(args, state, SETUP, {}),
        torch.randn(2, 3, 64, 64),
    )
    assert torch.equal(backbone.forward_features(images), model.forward_features(images))


def test_a_head_that_is_lost_does_not_end_the_others():
    """At 64 times the usual rate LARS lets a head grow without end."""
    torch.manual_seed(0)
    probe = Probe(6, 4, 2)
    with torch.no_grad():
        probe.head[2].weight.mul_(1e20)
    batch = {"image": torch.randn(8, 6), "label": torch.arange(8) % 4}
    objective = main_linprobe.Probing(
        probe, torch.nn.Identity(), ["lr1", "lr64"], "linear probe", SETUP, None
    )
    loss, terms = objective.loss(probe, batch)
    loss.backward()
    alone = torch.nn.functional.cross_entropy(probe(batch["image"])[0], batch["label"])
    assert loss == alone == terms["loss_head"] and (probe.head[2].weight.grad == 0).all()
    assert probe.head[1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "given, scratch, finetuned", [([], 1.0, 0.75), ([0.75], 0.75, 0.75), ([0.5], 0.5, 0.5), ([1], 1.0, 1.0)]
)
def test_a_layer_decay_acts_where_it_is_given(given, scratch, finetuned):
    model = build_classifier("vit_test", img_size=(32, 32), num_classes=3)
    words = ["--model", "vit_test", *(["--layer_decay", str(given[0])] if given else [])]
    args = parse(main_finetune.get_args_parser(), words)
    for file, expected in (("", scratch), ("x.pth", finetuned)):
        start = main_finetune.Start(None, file, None, [])
        groups = main_finetune.build_optimizer(args, model, start, 0.1).param_groups
        # Depth 2: the embedding is three layers below the head.
        assert min(group["lr_scale"] for group in groups) == expected**3
    labels = {"pos_label": "none", "pos_tokens": "half"}
    choices = main_finetune.Choices([], labels, {})
    stored = main_finetune.flags_to_store(args, start, SETUP, choices)
    assert stored["layer_decay"] == finetuned
    start = main_finetune.Start(None, "", None, [])
    assert main_finetune.flags_to_store(args, start, SETUP, choices)["layer_decay"] == scratch


def test_layer_decay_does_not_continue_an_optimizer_without_it():
    groups = [{"params": []}] * 2
    resume = Checkpoint("x.pth", {}, {}, None, {"optimizer": {"param_groups": groups}})
    # The head alone has two groups with layer decay, too.
    main_finetune.check_layer_decay(0.75, groups, resume)
    with pytest.raises(
        ValueError, match=r"--layer_decay 0.75: x.pth was trained without layer decay.*decay 1"
    ):
        main_finetune.check_layer_decay(0.75, groups * 2, resume)
    main_finetune.check_layer_decay(0.75, groups * 2, None)


def test_a_folder_for_predictions_is_asked_for_before_the_training(tmp_path, capsys):
    code, text = call(
        main_finetune,
        capsys,
        "--model",
        "vit_test",
        "--output_dir",
        tmp_path / "a",
        "--predictions",
        tmp_path / "none" / "p.csv",
    )
    assert code == 2 and "there is no such folder" in text and not (tmp_path / "a").exists()


def test_batch_statistics_of_frozen_layers_stay():
    model = torch.nn.Sequential(
        torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3, affine=False)
    )
    model.num_layers, model.layer_id = 2, lambda name: int(name[0] != "0") * 2
    frozen = freeze_all_but(model, 1)
    assert frozen == [model[0]]
    objective = main_finetune.Finetuning(model, None, SETUP, None, None)
    objective.frozen_norms = frozen
    model.train()
    objective.before_update(0.0)
    model(torch.randn(5, 3))
    assert (model[0].running_mean == 0).all() and (model[2].running_mean != 0).all()


def test_probed_features_are_normalised_as_documented():
    torch.manual_seed(0)
    vit = build_classifier("vit_test", img_size=(32, 32), num_classes=0, pool="cls").eval()
    images = torch.randn(3, 3, 32, 32)
    tokens = vit.forward_features(images)
    assert torch.equal(pooled(vit, images, "cls"), tokens[:, 0])
    mean = tokens[:, 1:].mean(1)
    by_hand = (mean - mean.mean(1, keepdim=True)) / (mean.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(pooled(vit, images, "avg"), by_hand, atol=1e-5)


@pytest.mark.parametrize("chunks", [(1000, 1000), (3, 7), (50, 1)])
def test_nearest_neighbours_against_scikit_learn(chunks):
    neighbours = pytest.importorskip("sklearn.neighbors")
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(200, 8)), rng.normal(size=(37, 8))
    labels = rng.integers(0, 4, 200)
    model = neighbours.KNeighborsClassifier(
        n_neighbors=10, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(bank, labels)
    similarity, index = nearest(torch.tensor(queries), torch.tensor(bank), 10, *chunks)
    distance, expected = model.kneighbors(queries)
    assert np.array_equal(index.numpy(), expected)
    assert np.allclose(similarity.numpy(), 1 - distance, atol=1e-5)
    votes = knn_votes(similarity, torch.tensor(labels)[index], 10, 4)
    assert np.allclose((votes / votes.sum(1, keepdim=True)).numpy(), model.predict_proba(queries), atol=1e-4)
    truth = rng.integers(0, 4, 37)
    right = knn_correct(
        torch.tensor(queries), torch.tensor(truth), torch.tensor(bank), torch.tensor(labels), 4, ks=(10,)
    )
    assert np.array_equal(right[10].numpy(), model.predict(queries) == truth)


def test_more_neighbours_than_images():
    similarity, index = nearest(torch.eye(3), torch.eye(3), 20)
    assert similarity.shape == (3, 3) and index[:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("weight_decay", [0.0, 2.0])
def test_the_probes_lars_is_maes(weight_decay):
    """With g' = g + decay w, matrices move by 0.001 |w| g' / |g'|; biases by g alone; momentum is 0.9."""
    torch.manual_seed(0)
    probe = Probe(6, 3, 2).double()
    optimizer = lars(probe.head[1:], [0.5, 2.0], 40.0, weight_decay)
    set_lr(optimizer, 40.0)
    expected = {p: p.detach().clone() for p in probe.parameters()}
    velocity = {p: torch.zeros_like(p) for p in probe.parameters()}
    for _ in range(3):
        for head, scale in zip(probe.head[1:], (0.5, 2.0)):
            for p in head.parameters():
                p.grad = 0.1 * torch.randn_like(p)
                step, w = p.grad.clone(), expected[p]
                if p.ndim > 1:
                    step = step + weight_decay * w
                    step = 0.001 * step * w.norm() / step.norm()
                velocity[p] = 0.9 * velocity[p] + step
                expected[p] = w - 40.0 * scale * velocity[p]
        optimizer.step()
    for p, w in expected.items():
        # timm adds 1e-8 to the norm of the gradient.
        assert torch.allclose(p, w, rtol=1e-6, atol=1e-9), (p.shape, (p - w).abs().max())
