"""Self-relations and self-distillation against slow obvious forms and lightly, and their properties."""

import math

import pytest
import torch
import torch.nn.functional as F

from layers.self_distillation import (
    Centre,
    MomentumUpdate,
    ProjectionHead,
    class_loss,
    patch_loss,
    view_cross_entropy,
)
from layers.self_relation import (
    RelationHead,
    cell_centres,
    cells_elsewhere,
    channel_loss,
    channel_relation,
    overlap_points,
    sample_tokens,
    spatial_loss,
    spatial_relation,
    to_crop,
    to_source,
    valid_mean,
)
from layers.transformer import patchify
from util.data.multicrop import crop_with_box


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def slow_spatial(student, teacher, heads, temperature):
    """The definition, a number at a time: rows of similarities per head, softmax over keys."""
    B, S, C = student.shape
    d, out = C // heads, torch.zeros(B)
    for b in range(B):
        for h in range(heads):
            s, t = (x[b, :, h * d : (h + 1) * d] for x in (student, teacher))
            for q in range(S):
                mine = torch.stack([(s[q] * s[k]).sum() / math.sqrt(d) for k in range(S)])
                theirs = torch.stack([(t[q] * t[k]).sum() / math.sqrt(d) for k in range(S)])
                out[b] -= ((theirs / temperature).softmax(0) * mine.softmax(0).log()).sum() / (heads * S)
    return out


def test_relations_are_those_of_the_definition():
    student, teacher = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    assert torch.allclose(
        spatial_loss(student, teacher, 2, 0.5), slow_spatial(student, teacher, 2, 0.5), atol=1e-5
    )
    valid = torch.tensor([[True, False, True, True, False], [False] * 5])
    found = spatial_loss(student, teacher, 2, 0.5, valid)
    assert torch.allclose(
        found[0], slow_spatial(student[:1, valid[0]], teacher[:1, valid[0]], 2, 0.5)[0], atol=1e-5
    )
    assert found[1] == 0
    expected = torch.zeros(2)
    for b in range(2):
        mine, theirs = (sum(torch.outer(z, z) for z in x[b]) / 5 for x in (student, teacher))
        expected[b] = -((theirs / 0.1).softmax(1) * mine.softmax(1).log()).sum(1).mean()
    assert torch.allclose(channel_loss(student, teacher, 0.1), expected, atol=1e-5)


def test_levels_at_the_start_are_those_known_for_vit_small():
    """Teacher entropy and cross-entropy on N(0, 1) tokens of 14x14 cells; ln 196 is the largest entropy."""
    x = torch.randn(4, 196, 384)
    with torch.no_grad():
        teacher, student = RelationHead(384, predictor=False)(x), RelationHead(384, predictor=True)(x)
    p = (spatial_relation(teacher, 6) / 0.5).softmax(-1)
    assert float(torch.special.entr(p).sum(-1).mean()) == pytest.approx(3.19, abs=0.03)
    assert float(spatial_loss(student, teacher, 6, 0.5).mean()) == pytest.approx(4.18, abs=0.04)
    p = (channel_relation(teacher) / 0.1).softmax(-1)
    assert float(torch.special.entr(p).sum(-1).mean()) == pytest.approx(5.69, abs=0.03)
    assert float(channel_loss(student, teacher, 0.1).mean()) == pytest.approx(5.92, abs=0.03)


def test_a_relation_of_samples_is_the_sample_of_the_relation():
    tokens, points = torch.randn(2, 12, 16), torch.rand(2, 7, 2) * 2 - 1
    from_features = spatial_relation(sample_tokens(tokens, (3, 4), points), 2)  # (B, heads, S, S)
    whole = spatial_relation(tokens, 2)  # (B, heads, N, N)
    keys = sample_tokens(whole.flatten(1, 2).transpose(1, 2), (3, 4), points)  # (B, S, heads*N): the key axis
    queries = sample_tokens(
        keys.transpose(1, 2).unflatten(1, (2, 12)).transpose(1, 2).flatten(2), (3, 4), points
    )
    sampled = queries.unflatten(2, (2, 7)).transpose(1, 2)  # (B, heads, S, S)
    assert torch.allclose(from_features, sampled.transpose(2, 3), atol=1e-5)


@pytest.mark.parametrize("hflip", [0.0, 1.0, 0.5])
def test_points_of_two_crops_are_the_same_places_of_the_image(hflip):
    """Pixels hold their own position; tokens are the means of patches. Real crops, rectangles, flips."""
    H, W = 375, 500
    y, x = torch.meshgrid((torch.arange(H) + 0.5) / W, (torch.arange(W) + 0.5) / W, indexing="ij")
    image = torch.stack([x, y])  # in units of the image's width
    seen, worst, total = 0, 0.0, 0.0
    for size, grid in (((224, 224), (14, 14)), ((96, 160), (6, 10))):
        for _ in range(12):
            crops, boxes = zip(*(crop_with_box(image, s, (0.2, 1.0), hflip) for s in ((224, 224), size)))
            a, b, share = overlap_points(*boxes, (5, 6))
            if share < 0.05:
                continue
            places, inside = [], torch.ones(30, dtype=torch.bool)
            for crop, points, cells in zip(crops, (a, b), ((14, 14), grid)):
                tokens = patchify(crop[None], (16, 16)).unflatten(2, (-1, 2)).mean(2)  # (1, L, 2)
                places.append(sample_tokens(tokens, cells, points[None])[0])
                # Beyond the centre of a crop's outermost token that token counts.
                inside &= (points.abs() < 1 - 1 / torch.tensor(cells[::-1])).all(-1)
            error = (places[0] - places[1]).abs()
            seen, worst, total = (
                seen + int(inside.sum()),
                max(worst, float(error[inside].max())),
                total + float(error.mean()),
            )
            where = to_source(a, boxes[0]) / W
            assert torch.allclose(places[0][inside], where[inside], atol=1e-3), (
                "and that place is the one of the points"
            )
    assert seen > 400 and worst < 1e-5 and total / 24 < 1e-3, (seen, worst, total)


def test_boxes_map_there_and_back():
    box = torch.tensor([[30.0, 40.0, 100.0, 60.0, 0.0], [30.0, 40.0, 100.0, 60.0, 1.0]])
    corner = torch.tensor([[[-1.0, -1.0]], [[-1.0, -1.0]]])
    assert torch.equal(to_source(corner, box)[:, 0], torch.tensor([[30.0, 40.0], [130.0, 40.0]]))
    points = torch.rand(2, 9, 2) * 2 - 1
    assert torch.allclose(to_crop(to_source(points, box), box), points, atol=1e-5)
    assert torch.allclose(cell_centres((2, 4))[5], torch.tensor([-0.25, 0.5]))
    ids = torch.tensor([[0, 7]])
    other = torch.tensor([[30.0, 40.0, 50.0, 60.0, 0.0]])  # the left half
    points, inside = cells_elsewhere(ids, (2, 4), box[:1], other)
    assert torch.allclose(points[0, 0], torch.tensor([-0.5, -0.5])) and inside.tolist() == [[True, False]]


def test_without_overlap_loss_and_gradient_are_exactly_zero():
    a, b = torch.tensor([[0.0, 0, 50, 50, 0]]), torch.tensor([[60.0, 10, 40, 80, 1]])
    at, at_other, share = overlap_points(a, b, (3, 3))
    assert share == 0
    tokens = torch.randn(1, 16, 8, requires_grad=True)
    losses = spatial_loss(
        sample_tokens(tokens, (4, 4), at), sample_tokens(torch.randn(1, 16, 8), (4, 4), at_other), 2
    )
    total = valid_mean(losses, share > 0.05)
    total.backward()
    assert total == 0 and torch.equal(tokens.grad, torch.zeros_like(tokens))
    # and next to an image that has one, it is not counted
    assert valid_mean(torch.tensor([3.0, 7.0, 5.0]), torch.tensor([True, False, True])) == 4


def test_the_teacher_gets_no_gradient():
    student, teacher = (torch.randn(2, 6, 8, requires_grad=True) for _ in range(2))
    (spatial_loss(student, teacher, 2).mean() + channel_loss(student, teacher).mean()).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_relation_heads_standardise_by_their_batch_and_share_names():
    x = torch.randn(3, 4, 5) * 7 + 3
    bn = torch.nn.BatchNorm1d(5)
    teacher, student = RelationHead(5, predictor=False), RelationHead(5, predictor=True)
    assert torch.allclose(teacher(x), bn(x.flatten(0, 1)).relu().view_as(x), atol=1e-5)
    assert torch.equal(teacher(x), teacher.eval()(x)), "there is nothing that evaluation could change"
    hidden = bn(x.flatten(0, 1)).relu() @ student.predictor.weight.T
    assert torch.allclose(student(x), torch.nn.BatchNorm1d(5)(hidden).relu().view_as(x), atol=1e-5)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    with torch.no_grad():
        student.norm.weight.add_(1.0)
    MomentumUpdate(teacher, student)(0.9)
    assert torch.allclose(teacher.norm.weight, before["norm.weight"] + 0.1) and set(before) < set(
        student.state_dict()
    )


def test_losses_equal_lightlys():
    loss = pytest.importorskip("lightly.loss", reason="the oracle: pip install lightly")
    K, B, V, T = 50, 6, 5, 0.055
    student, teacher = torch.randn(B, V, K), torch.randn(B, 2, K)
    theirs, centre = loss.DINOLoss(K, teacher_temp=T, warmup_teacher_temp_epochs=0), Centre(K)
    for _ in range(3):  # the centre moves between
        ours = class_loss(student, centre.target(teacher, T))
        centre.update(teacher.flatten(0, 1).mean(0))
        expected = theirs(list(teacher.unbind(1)), list(student.unbind(1)), teacher_temp=T)
        assert ours == pytest.approx(float(expected), abs=1e-5)
        student, teacher = torch.randn(B, V, K), teacher * 1.1 + 0.3
    assert torch.allclose(centre.mean, theirs.center.flatten(), atol=1e-5)

    mask = torch.rand(B, 4, 6) < 0.4
    mask[2] = False  # a view without masked patches counts 0
    student, teacher = torch.randn(B, 24, K), torch.randn(B, 24, K)
    theirs, centre = loss.IBOTPatchLoss(K, teacher_temp=T), Centre(K)
    for _ in range(2):
        flat = mask.flatten(1)
        expected = theirs(teacher[flat], student[flat], mask, teacher_temp=T)
        ids = flat.byte().argsort(dim=1, descending=True, stable=True)[:, : int(flat.sum(1).max())]
        pick = ids[..., None].expand(-1, -1, K)
        ours = patch_loss(
            student.gather(1, pick), centre.target(teacher.gather(1, pick), T), flat.gather(1, ids)
        )
        assert ours == pytest.approx(float(expected), abs=1e-5)
        centre.update(
            teacher[flat].mean(0)
        )  # lightly's centre takes masked patches only, iBOT's (and ours) all


# lightly 1.6 uses it, and torch names its own module as the place. Our code must not use it.
@pytest.mark.filterwarnings("ignore:.*weight_norm` is deprecated:FutureWarning")
def test_the_projection_head_equals_lightlys():
    heads = pytest.importorskip("lightly.models.modules", reason="the oracle: pip install lightly")
    theirs = heads.DINOProjectionHead(
        input_dim=12, hidden_dim=20, bottleneck_dim=8, output_dim=30, norm_last_layer=False
    )
    ours = ProjectionHead(12, 30, 20, 8, norm_last_layer=False)
    linears = [m for m in theirs.layers if isinstance(m, torch.nn.Linear)]
    for mine, other in zip(ours.mlp[::2], linears):
        mine.load_state_dict(other.state_dict())
    state = theirs.last_layer.state_dict()
    scale, direction = sorted(state.values(), key=torch.numel)
    with torch.no_grad():
        scale.copy_(torch.rand_like(scale) + 0.5)
        ours.prototypes.copy_(direction)
        ours.scale.copy_(scale.flatten())
    x = torch.randn(7, 12)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    unit = ours.project(x)
    assert torch.allclose(ours.logits(unit.mean(0)), ours(x).mean(0), atol=1e-5), (
        "why the centre needs no logits"
    )
    assert not ProjectionHead(4, 5, 6, 3).scale.requires_grad


def test_views_are_compared_with_all_others_but_themselves():
    student, target = torch.randn(3, 4, 6, 5), torch.rand(3, 2, 6, 5).softmax(-1)
    terms = [
        -(target[:, t] * F.log_softmax(student[:, s], -1)).sum(-1).mean()
        for t in range(2)
        for s in range(4)
        if s != t
    ]
    assert len(terms) == 6 and torch.allclose(view_cross_entropy(student, target), sum(terms) / 6, atol=1e-5)
