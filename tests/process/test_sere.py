"""Self-distillation, and self-relations in MAE: losses against explicit loops, and whole runs."""

import importlib
import math
import random
import signal

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import main_sere
import tiny
from backbones.registry import build_classifier
from layers.self_distillation import copy_parameters
from layers.self_relation import cells_elsewhere, channel_loss, overlap_points, sample_tokens, spatial_loss
from models_mae_pl import RelationTeacher
from models_sere import SereTeacher, make_centres
from processes import COMMON, FINETUNE, PRETRAIN, SERE, SERE_SMALL, assert_same, last, log_lines, ranks, start
from tools import inspect
from util.data.multicrop import MultiCrop, TwoViews, block_mask
from util.evaluate.effective_rank import effective_rank
from util.flags.parser import parse
from util.train.optim import clip_each
from util.weights import checkpoint, transfer

SIZE, LOCAL, GRID = (32, 48), (16, 32), (4, 6)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randomised(model):
    """Make weights so large that tokens differ, and so small that sums in another order agree to 1e-5.

    Norms keep their scale. Other processors add in another order.
    """
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 if p.ndim > 1 else p + torch.randn_like(p) * 0.1)
    return model


def sere(**kwargs):
    return randomised(tiny.sere_test(img_size=SIZE, local_size=LOCAL, out_dim=24, drop_path=0.0, **kwargs))


def sere_batch(B=5, num_local=3):
    crops = MultiCrop(
        SIZE,
        LOCAL,
        num_local,
        GRID,
        global_scale=(0.2, 0.5),
        local_scale=(0.05, 0.3),
        mask_ratios=[(0.0, 0.0), (0.1, 0.5)],
    )
    samples = [crops(torch.randint(256, (3, 60, 90), dtype=torch.uint8)) for _ in range(B)]
    batch = {k: torch.stack([s[k] for s in samples]) for k in samples[0]}
    return batch | {k: batch[k] / 255 - 0.5 for k in ("image", "local")}


def objective(model, teacher, centres, weights, temperature) -> main_sere.SelfDistillation:
    schedules = main_sere.Schedules(1, 0.99, 0.1, 0.1, temperature, temperature, 0, 0)
    return main_sere.SelfDistillation(model, teacher, centres, weights, 12, schedules)


@pytest.mark.parametrize("pos_embed", ["learned", "none"])
def test_losses_are_those_of_an_explicit_loop_over_pairs(pos_embed):
    model, batch = sere(pos_embed=pos_embed), sere_batch()
    teacher = copy_parameters(SereTeacher(model), model)
    randomised(teacher)
    centres = make_centres(24)
    centres["cls"].mean.normal_(), centres["patch"].mean.normal_()
    before = {k: c.mean.clone() for k, c in centres.items()}
    mask, boxes, temperature = batch["mask"], batch["boxes"], 0.06
    weights = dict(cls=2, patch=3, sr_spatial=5, sr_channel=7)
    loss, losses = objective(model, teacher, centres, weights, temperature).loss(model, batch)

    def encode(net, x, grid, m=None):
        x = net.patch_embed.embed_patches(
            torch.stack([F.unfold(i[None], 8, stride=8)[0].T for i in x])
            .unflatten(2, (3, 64))
            .transpose(2, 3)
            .flatten(2)
        )  # another way to cut patches
        if m is not None:
            x = torch.where(m[..., None], net.mask_token, x)
        x = torch.cat([net.cls_token.expand(len(x), -1, -1), x], 1)
        if net.pos_embed is not None:
            cells = net.pos_embed[:, 1:].unflatten(1, GRID).permute(0, 3, 1, 2)
            if grid != GRID:
                cells = F.interpolate(cells, size=grid, mode="bicubic")
            x = x + torch.cat([net.pos_embed[:, :1], cells.flatten(2).transpose(1, 2)], 1)
        for block in net.blocks:
            x = block(x)
        return x

    s = [encode(model, batch["image"][:, v], GRID, mask[:, v]) for v in range(2)]
    s += [encode(model, batch["local"][:, v], (2, 4)) for v in range(3)]
    t = [encode(teacher, batch["image"][:, v], GRID) for v in range(2)]
    assert torch.allclose(
        s[0], model.forward_tokens(batch["image"][:, 0], mask[:, 0], model.mask_token), atol=1e-5
    )
    heads = [model.ibot_head(model.norm(x)) / 0.1 for x in s], [teacher.ibot_head(teacher.norm(x)) for x in t]
    log_p = [x.log_softmax(-1) for x in heads[0]]
    cls = [((x[:, 0] - before["cls"]) / 0.06).softmax(-1) for x in heads[1]]
    patch = [((x[:, 1:] - before["patch"]) / 0.06).softmax(-1) for x in heads[1]]
    terms = [-(cls[a] * log_p[b][:, 0]).sum(-1).mean() for a in range(2) for b in range(5) if a != b]
    assert torch.allclose(losses["cls"], sum(terms) / 8, atol=1e-5)
    terms = [
        -(patch[v] * log_p[v][:, 1:]).sum(-1)[i][mask[i, v]].mean() if mask[i, v].any() else torch.zeros(())
        for v in range(2)
        for i in range(5)
    ]
    assert any(mask[i, v].any() for v in range(2) for i in range(5)) and torch.allclose(
        losses["patch"], sum(terms) / 10, atol=1e-5
    )
    expected = 0.9 * before["patch"] + 0.1 * torch.cat([x[:, 1:] for x in heads[1]]).mean((0, 1))
    assert torch.allclose(centres["patch"].mean, expected, atol=1e-5), "over all patches, not the masked ones"
    assert torch.allclose(
        centres["cls"].mean,
        0.9 * before["cls"] + 0.1 * torch.cat([x[:, 0] for x in heads[1]]).mean(0),
        atol=1e-5,
    )

    spatial, channel, skipped = [], [], 0
    together = [
        model.sr_spatial(torch.stack(s[:2], 1).flatten(0, 1)[:, 1:]).unflatten(0, (5, 2)),
        model.sr_spatial_local(torch.stack(s[2:], 1).flatten(0, 1)[:, 1:]).unflatten(0, (5, 3)),
    ]
    channels = [
        model.sr_channel(torch.stack(s[:2], 1).flatten(0, 1)[:, 1:]).unflatten(0, (5, 2)),
        model.sr_channel_local(torch.stack(s[2:], 1).flatten(0, 1)[:, 1:]).unflatten(0, (5, 3)),
    ]
    taught = {
        k: getattr(teacher, f"sr_{k}")(torch.stack(t, 1).flatten(0, 1)[:, 1:]).unflatten(0, (5, 2))
        for k in ("spatial", "channel")
    }
    for i in range(5):
        for a in range(2):
            for b in (b for b in range(5) if b != a):
                size, grid = ((3, 5), GRID) if b < 2 else ((2, 4), (2, 4))
                mine, theirs, share = overlap_points(boxes[i, b], boxes[i, a], size)
                own = together[b >= 2][i, b - 2 * (b >= 2)][None]
                value = spatial_loss(
                    sample_tokens(own, grid, mine[None]),
                    sample_tokens(taught["spatial"][i, a][None], GRID, theirs[None]),
                    2,
                    0.5,
                )
                if share > 0.05:
                    spatial.append(value)
                else:
                    skipped += 1
                channel.append(
                    channel_loss(
                        channels[b >= 2][i, b - 2 * (b >= 2)][None], taught["channel"][i, a][None], 0.1
                    )
                )
    assert skipped > 0 and torch.allclose(losses["sr_spatial"], torch.cat(spatial).mean(), atol=1e-5)
    assert torch.allclose(losses["sr_channel"], torch.cat(channel).mean(), atol=1e-5)
    total = 2 * losses["cls"] + 3 * losses["patch"] + 5 * losses["sr_spatial"] + 7 * losses["sr_channel"]
    assert torch.allclose(loss, total)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    unused = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not unused, unused


@pytest.mark.parametrize("num_local", [0, 1])
def test_few_local_crops(num_local):
    model, batch = (
        sere() if num_local else tiny.sere_test(img_size=SIZE, local_size=None, out_dim=24),
        sere_batch(3, num_local),
    )
    weights = dict(cls=1, patch=1, sr_spatial=1, sr_channel=1)
    teacher = copy_parameters(SereTeacher(model), model)
    loss, _ = objective(model, teacher, make_centres(24), weights, 0.05).loss(model, batch)
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_teacher_of_another_crop_is_read_at_the_places_of_the_visible_cells():
    views = TwoViews(SIZE, (0.3, 0.6), 0.5)
    samples = [views(torch.randint(256, (3, 60, 90), dtype=torch.uint8)) for _ in range(6)]
    image, second, boxes = (torch.stack([s[k] for s in samples]) for k in ("image", "second", "boxes"))
    model = randomised(tiny.mae_test(img_size=SIZE, sr_spatial=True, sr_channel=True, pos_label="none"))
    teacher = copy_parameters(RelationTeacher(model), model)
    keep = torch.rand(6, 24).argsort(1)[:, :9]
    taught = teacher(second / 255 - 0.5)
    losses, _, _ = model(image / 255 - 0.5, ids_keep=keep, relation_targets=taught | {"boxes": boxes})
    tokens = model._encode(model.patchify(image / 255 - 0.5), keep)[:, 1:]
    own, terms = model.sr_spatial(tokens), []
    for i in range(6):
        points, inside = cells_elsewhere(keep[i : i + 1], GRID, boxes[i : i + 1, 0], boxes[i : i + 1, 1])
        if inside.sum() > 1:
            theirs = sample_tokens(taught["spatial"][i : i + 1], GRID, points[:, inside[0]])
            terms.append(spatial_loss(own[i : i + 1, inside[0]], theirs, 2, 0.5))
    assert terms and torch.allclose(losses["sr_spatial"], torch.cat(terms).mean(), atol=1e-5)
    same, _, _ = model(image / 255 - 0.5, ids_keep=keep, relation_targets=teacher(image / 255 - 0.5))
    taught = teacher(image / 255 - 0.5)
    theirs = torch.stack([taught["spatial"][i, keep[i]] for i in range(6)])
    assert torch.allclose(same["sr_spatial"], spatial_loss(own, theirs, 2, 0.5).mean(), atol=1e-5)
    assert torch.allclose(
        same["sr_channel"], channel_loss(model.sr_channel(tokens), taught["channel"], 0.1).mean(), atol=1e-5
    )


def test_crops_belong_to_their_boxes_and_masks_are_blocks():
    image = torch.randint(256, (3, 50, 70), dtype=torch.uint8)
    crops = TwoViews((16, 24), (0.2, 1.0), 0.5)
    seen = set()
    for _ in range(8):
        out = crops(image)
        for view, (x, y, w, h, flipped) in zip((out["image"], out["second"]), out["boxes"].int().tolist()):
            part = image[:, y : y + h, x : x + w].float()
            part = (
                F.interpolate(part[None], (16, 24), mode="bicubic", antialias=True)[0].round().clamp(0, 255)
            )
            error = (view.float() - (part.flip(-1) if flipped else part)).abs()
            assert error.mean() < 1 and error.max() <= 10, "integer arithmetic on one side, noise as an image"
            seen.add(flipped)
    assert seen == {0, 1}
    sizes = [int(block_mask((14, 14), 0.3).sum()) for _ in range(50)]
    assert max(sizes) <= 58 and sum(sizes) / 50 > 48, "at most the ratio, and nearly all of it"
    assert not block_mask((14, 14), 0.0).any() and int(block_mask((2, 2), 0.5).sum()) <= 2
    mask = block_mask((14, 14), 0.4).float()
    borders = (mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum()
    assert borders < 0.5 * 2 * 2 * 14 * 13 * 0.4 * 0.6, "far fewer borders than scattered cells have"
    random.seed(1), torch.manual_seed(1)
    out = MultiCrop(
        (16, 24), (8, 8), 4, (4, 6), global_scale=(0.4, 1), local_scale=(0.05, 0.4), mask_ratios=[(0.1, 0.5)]
    )(torch.randint(256, (5, 50, 70), dtype=torch.uint8))  # five channels: geometry and blur only
    assert (
        out["local"].shape == (4, 5, 8, 8) and out["boxes"].shape == (6, 5) and out["mask"].shape == (2, 24)
    )
    area = out["boxes"][:, 2] * out["boxes"][:, 3] / 3500
    assert (area[:2] > 0.38).all() and (area[2:] < 0.43).all()


def test_schedules_clipping_and_effective_rank():
    args = parse(main_sere.get_args_parser(), ["--epochs", "100"])
    at = main_sere.build_objective(args, sere(), torch.device("cpu")).schedules
    values = [
        (at.momentum(t), at.weight_decay(t), at.temperature(t), at.frozen(t)) for t in (0, 15, 50.0, 100)
    ]
    assert values[0] == pytest.approx((0.996, 0.04, 0.04, True))
    assert values[1][2] == pytest.approx(0.055)
    assert values[2] == pytest.approx((0.998, 0.22, 0.07, False))
    assert values[3] == pytest.approx((1.0, 0.4, 0.07, False))
    params = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 4, 5)]
    grads = [torch.tensor([3.0, 0.0, 4.0]), torch.full((4,), 0.01)]
    for p, g in zip(params, grads):
        p.grad = g.clone()
    clip_each(params, 0.5)
    assert torch.allclose(params[0].grad, grads[0] / 10, atol=1e-5) and torch.equal(params[1].grad, grads[1])
    assert effective_rank(torch.eye(6)) == pytest.approx(6) and effective_rank(
        torch.ones(9, 5)
    ) == pytest.approx(1, abs=1e-4)
    p = torch.tensor([0.5, 0.25, 0.25])
    assert effective_rank(torch.diag(p) * 8) == pytest.approx(math.exp(float(-(p * p.log()).sum())))


RUN = ["--batch_size", 40, "--epochs", 3, "--lr", "1e-3"]


def here(output_dir, *flags, main) -> dict:
    """Run a main in this process, which spares the start of another -> its last checkpoint."""
    module = importlib.import_module(main[0])
    args = [str(x) for x in (*main[1:], "--output_dir", output_dir, *flags)]
    assert module.main(parse(module.get_args_parser(), args)) == 0
    return last(output_dir)


def assert_same_run(a: dict, b: dict, exact: bool = True) -> None:
    """Student, teacher and centres agree, bit for bit or up to rounding.

    The comparison up to rounding skips the keys' biases: softmax does not see them, and Adam turns their
    rounding errors into steps.
    """
    assert a.keys() == b.keys() and a["step"] == b["step"]
    if exact:
        assert_same(a, b)
    for name in ("model", "teacher", "centres"):
        for k, v in a.get(name, {}).items():
            w = b[name][k]
            if k.endswith("qkv.bias") and not exact:
                v, w = (torch.cat([x[:32], x[64:]]) for x in (v, w))
            assert torch.equal(v, w) if exact else torch.allclose(v, w, atol=2e-5), (
                name,
                k,
                (v - w).abs().max(),
            )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("sere")
    here(out, *RUN, main=SERE)
    return out


def test_a_killed_run_goes_on_bit_for_bit(uninterrupted, tmp_path):
    code, text = start(
        tmp_path,
        *RUN,
        "--save_steps",
        1,
        "--num_workers",
        2,
        main=SERE,
        TEST_SIGNAL=f"0:{random.randrange(4, 9)}:SIGKILL",
    )
    assert code == -signal.SIGKILL, text
    assert 4 <= last(tmp_path)["step"] < 9
    assert_same_run(last(uninterrupted), here(tmp_path, *RUN, main=SERE))
    assert log_lines(uninterrupted) == log_lines(tmp_path)


def test_an_exact_run_with_accumulation_goes_on_bit_for_bit(tmp_path):
    flags = ["--sere_exact", "--accum_iter", 2, "--patch_prototypes", "own", "--patch_out_dim", 20]
    flags += ["--pred_shape", "rand", "--pred_start_epoch", 1, "--warmup_teacher_temp_epochs", 2]
    flags += ["--no-norm_last_layer", "--teacher_patch_temp", 0.05, "--freeze_last_layer", 1]
    one = here(tmp_path / "one", *RUN, *flags, main=SERE)
    assert one["step"] == 6 and one["centres"].keys() == {"cls.mean", "patch.mean"}
    # In the second micro-batch of the fourth update.
    code, text = start(
        tmp_path / "killed", *RUN, *flags, "--save_steps", 1, main=SERE, TEST_SIGNAL="0:7:SIGKILL"
    )
    assert code == -signal.SIGKILL and last(tmp_path / "killed")["step"] == 3, text
    assert_same_run(one, here(tmp_path / "killed", *RUN, *flags, main=SERE))
    assert log_lines(tmp_path / "one") == log_lines(tmp_path / "killed")
    lines = log_lines(tmp_path / "one")
    assert lines[0]["train_patch"] == 0 and lines[1]["train_patch"] > 0, "no masks in the first epoch"
    decays = sorted(group["weight_decay"] for group in one["optimizer"]["param_groups"])
    assert decays == [0.0, pytest.approx(main_sere.cosine(2.5, start=0.04, end=0.4, total=3))]


def test_the_published_command_trains(tmp_path, capsys):
    """The command of SERE's README for ViT-S, made small by flags at its end."""
    for i in range(5):
        path = tmp_path / "train" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (40, 50, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    smaller = (
        f"--arch vit_tiny --data_path {tmp_path / 'train'} --batch_size_per_gpu 2 --epochs 1 --out_dim 64"
    )
    smaller += " --local_crops_number 2 --overlap_size 3 3 --warmup_epochs 0 --num_workers 0"
    ours = "--input_size 32 --local_size 16 --device cpu"
    command = ["main_sere", *SERE_SMALL.split(), *smaller.split(), *ours.split()]
    saved = here(tmp_path / "out", main=command)
    text = capsys.readouterr().out
    assert "--use_fp16 true applies to GPUs only" in text and "fp32 on cpu" in text
    assert "5 images" in text and "lr 3.91e-06" in text, "5e-4 * 2 / 256"
    assert saved["step"] == 2 and saved["args"]["sere_exact"] and saved["args"]["clip_grad"] == 0.3
    assert saved["model"]["blocks.11.attn.qkv.weight"].shape == (576, 192)
    losses = log_lines(tmp_path / "out")[-1]
    weights = dict(cls=1.65, patch=1.65, sr_spatial=0.2, sr_channel=0.5)
    assert losses["train_loss"] == pytest.approx(sum(w * losses[f"train_{n}"] for n, w in weights.items()))
    here(tmp_path / "out", main=command)
    assert "all epochs (1) are done already" in capsys.readouterr().out, "a run in the folder is continued"


def test_what_a_run_leaves(uninterrupted):
    saved, lines = last(uninterrupted), log_lines(uninterrupted)
    assert (
        checkpoint.kind_of(saved["model"]) == "self-distillation" and {"teacher", "centres"} <= saved.keys()
    )
    assert {
        "train_cls",
        "train_patch",
        "train_sr_spatial",
        "train_sr_channel",
        "chance_sr_channel",
        "test_effective_rank_cls",
        "test_effective_rank_avg",
    } <= lines[0].keys()
    assert 1 < lines[-1]["test_effective_rank_cls"] <= 32
    assert {g["weight_decay"] for g in saved["optimizer"]["param_groups"]} == {
        0.0,
        main_sere.cosine(2 + 4 / 5, start=0.04, end=0.4, total=3),
    }, "the value of the last update"
    moved = (
        (saved["teacher"]["blocks.0.mlp.fc1.weight"] - saved["model"]["blocks.0.mlp.fc1.weight"]).abs().max()
    )
    assert moved > 0, "an average of the past, not a copy"
    text = inspect.describe(str(uninterrupted / "checkpoint-last.pth"))
    assert "main_sere.py (student and teacher); this toolkit's" in text and "sere_test" in text, text


def test_prototypes_are_frozen_at_the_start(uninterrupted, tmp_path):
    torch.manual_seed(0)
    begin = main_sere.build_model(parse(main_sere.get_args_parser(), [str(x) for x in SERE[1:]])).state_dict()
    frozen = here(tmp_path, *RUN, "--freeze_last_layer", 3, main=SERE)["model"]
    name, other = "ibot_head.prototypes", "ibot_head.mlp.0.weight"
    assert torch.equal(begin[name], frozen[name]) and not torch.equal(begin[other], frozen[other])
    assert not torch.equal(begin[name], last(uninterrupted)["model"][name])


def test_two_ranks_equal_one(tmp_path):
    flags = ["--epochs", 2, "--lr", "3e-4", "--drop_path", 0, "--freeze_last_layer", 0.5]
    one = here(tmp_path / "one", *flags, "--batch_size", 48, main=SERE)
    results = ranks(2, tmp_path / "two", *flags, "--batch_size", 24, main=SERE)
    assert [c for c, _ in results] == [0, 0], results
    assert_same_run(one, last(tmp_path / "two"), exact=False)
    for a, b in zip(log_lines(tmp_path / "one"), log_lines(tmp_path / "two")):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)


RELATIONS = ["--sr_spatial", 0.2, "--sr_channel", 0.5]


def test_weight_zero_changes_no_bit_and_builds_no_teacher(tmp_path):
    run = ["--batch_size", 40, "--epochs", 1, "--lr", "1e-3", "--pos_label", "apl+rpl", "--rpl_pairs", 2]
    plain = here(tmp_path / "plain", *run, main=PRETRAIN)
    zero = here(
        tmp_path / "zero", *run, "--sr_spatial", 0, "--sr_channel", 0.0, "--sr_views", "two", main=PRETRAIN
    )
    assert_same(plain, zero)
    assert plain.keys() == zero.keys() and "teacher" not in zero
    assert log_lines(tmp_path / "plain") == log_lines(tmp_path / "zero")
    # and a pair of weights changes no bit of the start
    states = []
    for on in (False, True):
        torch.manual_seed(0)
        states.append(tiny.mae_test(img_size=(32, 32), sr_spatial=on, sr_channel=on).state_dict())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


@pytest.mark.parametrize("views", ["same", "two"])
def test_relations_inside_of_mae_go_on_bit_for_bit_and_on_two_ranks(tmp_path, views):
    flags = ["--epochs", 2, "--lr", "3e-4", *RELATIONS, "--sr_views", views]
    one = here(tmp_path / "one", "--batch_size", 48, *flags, main=PRETRAIN)
    assert {"train_sr_spatial", "train_sr_channel", "test_effective_rank_avg"} <= log_lines(tmp_path / "one")[
        -1
    ].keys()
    if views == "same":
        code, text = start(
            tmp_path / "killed", "--batch_size", 48, *flags, "--save_steps", 1, TEST_SIGNAL="0:6:SIGKILL"
        )
        assert code == -signal.SIGKILL, text
        assert_same_run(one, here(tmp_path / "killed", "--batch_size", 48, *flags, main=PRETRAIN))
    else:
        results = ranks(2, tmp_path / "two", "--batch_size", 24, *flags)
        assert [c for c, _ in results] == [0, 0], results
        assert_same_run(one, last(tmp_path / "two"), exact=False)


def test_the_backbone_goes_on_to_all_commands(uninterrupted, tmp_path, capsys):
    file = str(uninterrupted / "checkpoint-last.pth")
    saved = checkpoint.load(file)
    model = build_classifier("vit_test", img_size=(32, 32), num_classes=3, pos_embed="learned", pool="cls")
    note = transfer.init_encoder(model, saved, "zero")
    assert "the teacher's weights" in note and "new: head" in note
    for k, v in model.state_dict().items():
        assert k.startswith("head") or torch.equal(v, saved.entries["teacher"][k]), k
    here(tmp_path / "ft", "--finetune", file, "--epochs", 1, main=FINETUNE)
    probe = ["main_linprobe", "--model", "vit_test", *COMMON, "--finetune", file, "--batch_size", 50]
    here(tmp_path / "lp", "--cached", "--epochs", 1, main=probe)
    module = importlib.import_module("main_linprobe")
    assert (
        module.main(
            parse(module.get_args_parser(), [*map(str, probe[1:]), "--knn", "--output_dir", str(tmp_path)])
        )
        == 0
    )
    text = capsys.readouterr().out
    assert text.count("the teacher's weights") == 3 and text.count("Acc@1") >= 2 and "effective rank" in text
    with pytest.raises(
        ValueError, match=r"is a checkpoint of main_sere.py \(student and teacher\), not a full pretraining"
    ):
        here(tmp_path / "mae", "--resume", file, main=PRETRAIN)


@pytest.mark.parametrize(
    "flags,says",
    [
        (["--local_size", "20"], "not a multiple of the patch"),
        (["--model", "vit_test"], "is unknown"),
        (["--pred_ratio", "0.3"], "give a width for each"),
        (["--pred_ratio", "0.1", "--pred_ratio_var", "0.2"], "must lie in"),
    ],
)
def test_wrong_flags_say_so(tmp_path, flags, says):
    with pytest.raises(ValueError, match=says):
        here(tmp_path, *flags, main=SERE)


def test_a_dry_run_plans_and_leaves_nothing(tmp_path):
    code, text = start(tmp_path / "run", *RUN, "--dry_run", main=SERE)
    assert code == 0 and "plan (nothing is written)" in text and "GFLOP per update" in text, text
    assert not (tmp_path / "run").exists()
