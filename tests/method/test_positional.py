"""Positional labels against slow, obvious forms."""

import math
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from layers.contract import Labels
from layers.positional import pairs as positional
from layers.positional.head import PositionalHead
from layers.positional.kinds.apl import apl_chance
from layers.positional.kinds.rpl import rpl_chance
from layers.positional.pairs import num_offsets, relative_labels

GRIDS = [(3, 3), (2, 5), (7, 7), (1, 6), (14, 14)]


@pytest.mark.parametrize("grid", GRIDS)
def test_relative_labels_by_brute_force(grid):
    h, w = grid
    ids = torch.arange(h * w)[None]
    labels = relative_labels(grid, ids, ids)[0]
    for i in range(h * w):
        for j in range(h * w):
            dr, dc = i // w - j // w, i % w - j % w
            assert labels[i, j] == (dr + h - 1) * (2 * w - 1) + (dc + w - 1)
    assert labels.min() == 0 and labels.max() == num_offsets(grid) - 1


def test_relative_labels_of_the_papers_figure():
    # Figure 2: seen from the centre of a 3x3 grid.
    ids = torch.arange(9)[None]
    assert relative_labels((3, 3), ids[:, 4:5], ids)[0, 0].tolist() == [18, 17, 16, 13, 12, 11, 8, 7, 6]


def test_relative_labels_of_visible_cells_name_the_original_grid():
    ids = torch.tensor([[11, 0, 6]])  # cells (2,3), (0,0), (1,2) of a 3x4 grid
    labels = relative_labels((3, 4), ids, ids)[0]
    assert labels[0, 1] == (2 + 2) * 7 + (3 + 3)
    assert labels[1, 0] == (-2 + 2) * 7 + (-3 + 3)
    assert labels[2, 2] == num_offsets((3, 4)) // 2


def naive_rpl(head, x, ids, half):
    """Eq. 7-9 word by word: concatenate every pair, run the MLP, classify, average."""
    B, n, D = x.shape
    left, right = (x[..., : D // 2], x[..., D // 2 :]) if half else (x, x)
    pairs = torch.cat([left[:, :, None].expand(B, n, n, -1), right[:, None].expand(B, n, n, -1)], dim=-1)
    logits = head.classifier(head.fc2(F.gelu(head.fc1(pairs))))
    labels = relative_labels(head.grid, ids, ids)
    return F.cross_entropy(logits.flatten(0, 2), labels.flatten()), (
        logits.argmax(-1) == labels
    ).double().mean()


@pytest.mark.parametrize("tokens", ["half", "full"])
@pytest.mark.parametrize("chunk", [10**6, 50, 7])  # everything at once; some rows; less than one row of pairs
@pytest.mark.parametrize("visible", [False, True])
def test_rpl_equals_naive_concatenation(tokens, chunk, visible, monkeypatch):
    monkeypatch.setitem(positional.PAIRS_PER_CHUNK, "cpu", chunk)
    torch.manual_seed(0)
    grid, B, D = (3, 4), 3, 16
    head = PositionalHead(D, grid, Labels("rpl", tokens)).double()
    for p in head.parameters():
        torch.nn.init.normal_(p)
    ids = torch.stack([torch.randperm(12) for _ in range(B)])[:, : 5 if visible else 12]
    x = torch.randn(B, ids.shape[1], D, dtype=torch.float64, requires_grad=True)

    out = head(x, ids)
    out["position"].backward()
    grads = [x.grad.clone()] + [p.grad.clone() for p in head.parameters()]
    x.grad = None
    head.zero_grad()
    loss, acc = naive_rpl(head.rpl, x, ids, tokens == "half")
    loss.backward()
    assert torch.allclose(out["position"], loss, rtol=1e-12)
    assert torch.allclose(out["position_acc"].double(), acc)
    for mine, naive in zip(grads, [x.grad] + [p.grad for p in head.parameters()]):
        assert torch.allclose(mine, naive, rtol=1e-9, atol=1e-12)
        assert naive.abs().max() > 0


def test_rpl_logits_agree_with_the_loss():
    torch.manual_seed(0)
    head = PositionalHead(8, (2, 3), Labels("rpl")).double()
    x, ids = torch.randn(2, 6, 8, dtype=torch.float64), torch.arange(6).expand(2, -1)
    logits = head.rpl.logits(x)
    expected = F.cross_entropy(logits.flatten(0, 2), relative_labels((2, 3), ids, ids).flatten())
    assert torch.allclose(head(x)["position"], expected)


def test_sampled_pairs_are_unbiased():
    torch.manual_seed(0)
    head = PositionalHead(16, (4, 4), Labels("rpl")).double()
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x, ids = torch.randn(2, 16, 16, dtype=torch.float64), torch.arange(16).expand(2, -1)
    full = head(x, ids)["position"]
    full.backward()
    full_grad = head.rpl.fc1.weight.grad.clone()
    head.rpl.pairs = 3
    draws, grads = [], []
    for _ in range(600):
        head.zero_grad()
        loss = head(x, ids)["position"]
        loss.backward()
        draws.append(loss.item())
        grads.append(head.rpl.fc1.weight.grad.clone())
    draws, grads = torch.tensor(draws), torch.stack(grads)
    assert draws.std() > 0, "nothing was sampled"
    assert abs(draws.mean() - full.item()) < 4 * draws.std() / math.sqrt(len(draws))
    error = (grads.mean(0) - full_grad).abs()
    assert (error < 5 * grads.std(0) / math.sqrt(len(grads)) + 1e-12).all()
    head.eval()
    assert head(x, ids)["position"].item() == pytest.approx(full.item()), "evaluation takes all pairs"


def test_sampled_pairs_label_the_drawn_partners():
    """Weights that answer every pair rightly stay right under sampling: labels follow the drawn keys."""
    torch.manual_seed(0)
    h, w = 3, 4
    head = PositionalHead(8, (h, w), Labels("rpl", rpl_pairs=5))
    ids = torch.stack([torch.randperm(12)[:7] for _ in range(4)])
    labels = relative_labels((h, w), ids, ids)
    seen = {}

    def spy(q, k, weight, bias, grid, query_ids, key_ids):
        seen.update(k=k, key_ids=key_ids, query_ids=query_ids)
        return q.sum() * 0, torch.zeros(())

    original, positional.pair_loss = positional.pair_loss, spy
    try:
        x = torch.randn(4, 7, 8)
        head(x, ids)
    finally:
        positional.pair_loss = original
    assert seen["key_ids"].shape == (4, 5)
    all_keys = head.rpl.project(x)[1]
    for b in range(4):
        for m in range(5):
            token = (ids[b] == seen["key_ids"][b, m]).nonzero().item()
            assert torch.equal(seen["k"][b, m], all_keys[b, token])
    assert torch.equal(seen["query_ids"], ids) and labels.shape == (4, 7, 7)


@pytest.mark.parametrize("chunk", [10**6, 9, 2])  # everything at once; some rows; less than one row of pairs
@pytest.mark.parametrize("precision,tolerance", [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_sampled_pairs_equal_naive_concatenation(chunk, precision, tolerance, monkeypatch):
    """Loss, accuracy and gradients against every drawn pair written out in float64."""
    monkeypatch.setitem(positional.PAIRS_PER_CHUNK, "cpu", chunk)
    torch.manual_seed(0)
    grid, B, n, D, drawn = (3, 4), 3, 7, 16, 4
    head = PositionalHead(D, grid, Labels("rpl", rpl_pairs=drawn)).double()
    for p in head.parameters():
        torch.nn.init.normal_(p)
    ids = torch.stack([torch.randperm(12)[:n] for _ in range(B)])
    x = torch.randn(B, n, D, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    partners = torch.rand(B, n).argsort(1)[:, :drawn]
    pairs = torch.stack(
        [
            torch.stack(
                [torch.cat([x[b, i, : D // 2], x[b, j, D // 2 :]]) for i in range(n) for j in partners[b]]
            )
            for b in range(B)
        ]
    )  # (B, n*drawn, D)
    logits = head.rpl.classifier(head.rpl.fc2(F.gelu(head.rpl.fc1(pairs))))
    labels = relative_labels(grid, ids, ids.gather(1, partners)).flatten(1)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    expected = [x.grad, *(p.grad for p in head.parameters())]

    mine = PositionalHead(D, grid, Labels("rpl", rpl_pairs=drawn)).to(precision)
    mine.load_state_dict(head.state_dict())
    y = x.detach().to(precision).requires_grad_()
    torch.manual_seed(1)
    out = mine(y, ids)
    out["position"].backward()
    assert out["position"].item() == pytest.approx(loss.item(), rel=tolerance)
    assert out["position_acc"].item() == pytest.approx((logits.argmax(-1) == labels).double().mean().item())
    for found, naive in zip([y.grad, *(p.grad for p in mine.parameters())], expected):
        assert (found - naive).norm() < tolerance * naive.norm()


def test_the_sweep_holds_one_copy_of_the_logits(monkeypatch):
    """The largest tensors are the operands of a chunk's products, (pairs, hidden) and (pairs, offsets)."""
    monkeypatch.setitem(positional.PAIRS_PER_CHUNK, "cpu", 500)
    head, x = PositionalHead(16, (8, 8), Labels("rpl")), torch.randn(4, 64, 16, requires_grad=True)

    class Made(TorchDispatchMode):
        sizes = Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            before = {a.untyped_storage().data_ptr() for a in args if torch.is_tensor(a)}
            for t in out if isinstance(out, tuple) else (out,):
                if torch.is_tensor(t) and t.untyped_storage().data_ptr() not in before:
                    self.sizes[t.numel()] += 1
            return out

    with Made() as made:
        head(x)["position"].backward()
    rows, offsets = 7 * 64, 240  # 225 offsets, and 15 that make a multiple of 16
    assert made.sizes[rows * offsets] == 4 * 9 and max(made.sizes) == rows * offsets, (
        "nine chunks an image and a short one"
    )


@pytest.mark.parametrize("tokens", ["half", "full"])
def test_apl_equals_the_formula(tokens):
    torch.manual_seed(0)
    head = PositionalHead(16, (2, 3), Labels("apl", tokens)).double()
    x, ids = torch.randn(2, 4, 16, dtype=torch.float64), torch.tensor([[5, 0, 2, 1], [3, 3, 4, 0]])
    total, right = 0.0, 0
    for b in range(2):
        for i in range(4):
            token = x[b, i, : 8 if tokens == "half" else 16]
            hidden = head.apl.fc2(F.gelu(head.apl.fc1(token)))
            logp = head.apl.classifier(hidden).log_softmax(0)
            total -= logp[ids[b, i]].item()
            right += int(logp.argmax() == ids[b, i])
    out = head(x, ids)
    assert out["position"].item() == pytest.approx(total / 8, rel=1e-10)
    assert out["position_acc"].item() == pytest.approx(right / 8)


def test_half_tokens_leave_the_other_half_alone():
    head = PositionalHead(16, (2, 2), Labels("apl"))
    x = torch.randn(1, 4, 16, requires_grad=True)
    head(x)["position"].backward()
    assert x.grad[..., :8].abs().max() > 0 and x.grad[..., 8:].abs().max() == 0


def test_both_labels_add_up():
    torch.manual_seed(0)
    head = PositionalHead(16, (2, 3), Labels("apl+rpl"))
    out = head(torch.randn(2, 6, 16))
    assert out["position"].item() == pytest.approx(out["apl"].item() + out["rpl"].item())
    assert out["position_acc"].item() == pytest.approx((out["apl_acc"].item() + out["rpl_acc"].item()) / 2)


@pytest.mark.parametrize("grid,n", [((3, 3), 9), ((2, 5), 10), ((4, 4), 4), ((3, 4), 1)])
def test_rpl_chance_is_the_entropy_of_the_labels(grid, n):
    """Counted over many random visible sets; exactly for all cells."""
    torch.manual_seed(0)
    L = grid[0] * grid[1]
    draws = 1 if n == L else 4000
    counts = torch.zeros(num_offsets(grid))
    for _ in range(draws):
        ids = torch.randperm(L)[None, :n]
        counts += torch.bincount(relative_labels(grid, ids, ids).flatten(), minlength=len(counts))
    p = counts / counts.sum()
    entropy = -(p[p > 0] * p[p > 0].log()).sum().item()
    loss, acc = rpl_chance(grid, n)
    assert loss == pytest.approx(entropy, abs=1e-5 if draws == 1 else 0.02)
    assert acc == pytest.approx(p.max().item(), abs=1e-6 if draws == 1 else 0.02)


def test_known_chance_levels():
    assert rpl_chance((14, 14), 196)[0] == pytest.approx(6.269, abs=1e-3)
    assert rpl_chance((7, 7), 49)[0] == pytest.approx(4.858, abs=1e-3)
    assert apl_chance((14, 14)) == (pytest.approx(5.278, abs=1e-3), 1 / 196)


def test_bf16_gradients_stay_close_to_float32():
    """Accumulation over many chunks happens in float32, also if the products have a lower precision."""
    torch.manual_seed(0)
    head = PositionalHead(32, (8, 8), Labels("rpl"))
    x = torch.randn(40, 64, 32)
    grads = {}
    for enabled in (False, True):
        head.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = head(x)["position"]
        assert loss.dtype == torch.float32
        loss.backward()
        grads[enabled] = [p.grad.clone() for p in head.parameters()]
    for exact, low in zip(grads[False], grads[True]):
        assert (low - exact).norm() < 0.02 * exact.norm()


def test_bad_arguments_name_the_flag():
    with pytest.raises(ValueError, match="`pos_label`"):
        PositionalHead(16, (2, 2), Labels("abl"))
    with pytest.raises(ValueError, match="`pos_tokens`"):
        PositionalHead(16, (2, 2), Labels("apl", "third"))
    with pytest.raises(ValueError, match="do not belong together"):
        PositionalHead(16, (2, 2), Labels("apl"))(torch.randn(1, 3, 16), torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("batch", [1, 4])
def test_compiling_does_not_unroll_the_sweep(batch):
    """4 images are 64 chunks. Unrolled, a GPU's batch would be thousands of nodes."""
    head, nodes = PositionalHead(16, (14, 14), Labels("rpl")), []

    def count(graph, inputs):
        nodes.append(
            sum(len(part.graph.nodes) for part in graph.modules() if isinstance(part, torch.fx.GraphModule))
        )
        return graph.forward

    torch._dynamo.reset()
    x = torch.randn(batch, 196, 16)
    assert torch.allclose(torch.compile(head, backend=count)(x)["position"], head(x)["position"])
    assert 0 < sum(nodes) < 60, nodes


@pytest.mark.parametrize(
    "batch, most, even, expected",
    [
        (256, 27, True, 16),
        (128, 27, True, 16),
        (60, 27, True, 20),
        (7, 4, True, 4),
        (6, 27, True, 6),
        (256, 27, False, 27),
        (5, 27, False, 5),
    ],
)
def test_images_of_a_chunk(batch, most, even, expected):
    """The largest divisor of the batch, so that all chunks have one shape, unless it is small."""
    assert positional.images_per_chunk(batch, most, even) == expected


@pytest.fixture
def nothing_compiled():
    positional._compiled_chunk = None
    yield
    positional._compiled_chunk = None


def chunk_of(dtype=torch.float64):
    torch.manual_seed(0)
    q, k = torch.randn(2, 5, 8, dtype=dtype), torch.randn(2, 6, 8, dtype=dtype)
    return q, k, torch.randn(16, 8, dtype=dtype), torch.randn(16, dtype=dtype), torch.randint(16, (60,))


def test_the_traced_chunk_equals_the_eager_one(nothing_compiled, monkeypatch):
    """It subtracts the right answers by a comparison, where the eager one scatters."""
    graphs, compiled = [], torch.compile

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda function, dynamic: compiled(function, dynamic=dynamic, backend=backend)
    )
    found, expected = positional._chunk_on_cuda(*chunk_of(), True), positional._pair_chunk(*chunk_of(), True)
    assert len(graphs) == 1 and not any("scatter" in name for name in graphs[0])
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12)
    positional._chunk_on_cuda(*chunk_of(), False)
    assert len(graphs) == 1, "chunks without gradients are not compiled"


def test_where_nothing_compiles_the_sweep_warns_once_and_goes_on(nothing_compiled, monkeypatch):
    def compiled(function, dynamic):
        def fail(*args):
            raise RuntimeError("no C compiler")

        return fail

    monkeypatch.setattr(torch, "compile", compiled)
    with pytest.warns(UserWarning, match="no C compiler"):
        found = positional._chunk_on_cuda(*chunk_of(), True)
    assert torch.equal(found[0], positional._pair_chunk(*chunk_of(), True)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        positional._chunk_on_cuda(*chunk_of(), True)
