"""Logistic regression on patches against scikit-learn's: hard and soft labels, all sources and penalties."""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from util.evaluate.segments import logistic
from util.evaluate.segments.logistic import PatchSample, Solution, describe, fit_probes, logits_of, solve

N, D, K = 240, 5, 3
STRENGTHS = (1e-3, 0.1, 10.0)


def problem(dtype=torch.float64):
    """Features and hard classes that overlap."""
    draws = torch.Generator().manual_seed(0)
    classes = torch.randint(K, (N,), generator=draws)
    features = torch.randn(N, D, generator=draws, dtype=torch.float64) + torch.eye(K, D)[classes]
    return features.to(dtype), classes


def soft(count=40):
    """Shares of quarters, some of them zero."""
    draws = torch.Generator().manual_seed(1)
    quarters = torch.randint(K, (count, 4), generator=draws)
    return torch.nn.functional.one_hot(quarters, K).double().mean(1)


def reference(features, classes, strength, weight=None):
    model = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000)
    return model.fit(features.numpy(), classes.numpy(), weight)


def assert_same(solution, model, atol=1e-4):
    # Adding a number to all biases changes nothing.
    bias = solution.bias - solution.bias.mean()
    assert np.allclose(solution.weight, model.coef_, atol=atol)
    assert np.allclose(bias, model.intercept_ - model.intercept_.mean(), atol=atol)


def test_solutions_are_those_of_scikit_learn(monkeypatch):
    monkeypatch.setattr(logistic, "_ROWS", 100)
    features, classes = problem()
    labels = torch.eye(K, dtype=torch.float64)[classes]
    found = solve(features, labels, STRENGTHS, tolerance=1e-8)
    for strength, solution in zip(STRENGTHS, found, strict=True):
        assert_same(solution, reference(features, classes, strength))
        assert solution.slope <= 1e-6 and 0 < solution.updates < 200
    # In float32, and in falling order.
    for strength, solution in zip(STRENGTHS[::-1], solve(features.float(), labels.float(), STRENGTHS[::-1])):
        assert_same(solution, reference(features, classes, strength), atol=0.01)
        assert solution.slope <= logistic.TOLERANCE


def test_soft_labels_are_rows_with_weights():
    features, labels = problem()[0][:40], soft()
    rows = features.repeat_interleave(K, dim=0)
    classes = torch.arange(K).repeat(40)
    (solution,) = solve(features, labels, [0.5], tolerance=1e-8)
    assert_same(solution, reference(rows, classes, 0.5, labels.flatten().numpy()))


class Two:
    """Two sources of features: all, and the first two."""

    names = ("all", "some")
    projection = None

    def widths(self):
        return [D, 2]

    def __call__(self, maps):
        return torch.cat([maps, maps[:, :2]], dim=1)


def test_probes_of_all_sources_are_those_of_standardised_features():
    features, classes = problem(torch.float32)
    # Of another place and size, which the probe must undo.
    features = features * torch.tensor([10, 1, 0.1, 1, 1]) + torch.tensor([0, 5, 0, 0, -100])
    sample = PatchSample(D + 2, K, N, torch.device("cpu"), half=False, label_dtype=torch.float32)
    labels = torch.eye(K)[classes]
    labels[7] = 0  # a patch that is all ignored
    sample.add(torch.cat([features, features[:, :2]], dim=1), labels, torch.arange(N))
    sample.gather()
    stored = sample.features.clone()
    probes, notes = fit_probes(Two(), sample, STRENGTHS)
    assert torch.equal(sample.features, stored)
    counted = torch.arange(N) != 7
    maps = features[:12].t().reshape(1, D, 3, 4)
    found = logits_of(Two(), probes)(maps).unflatten(1, (2, len(STRENGTHS), K))  # (1, 2, S, K, 3, 4)
    for i, width in enumerate((D, 2)):
        scaler = StandardScaler().fit(features[counted, :width].double().numpy())
        for j, strength in enumerate(STRENGTHS):
            seen = torch.from_numpy(scaler.transform(features[:, :width].double().numpy()))
            model = reference(seen[counted], classes[counted], strength)
            expected = model.predict_proba(seen[:12].numpy())
            shares = found[0, i, j].softmax(0).flatten(1).t()
            assert np.allclose(shares, expected, atol=1e-3)
    assert [note.partition(": updates at C 0.001 ")[0] for note in notes] == ["all", "some"]


def test_what_is_not_solved_is_said():
    features, classes = problem()
    labels = torch.eye(K, dtype=torch.float64)[classes]
    found = solve(features, labels, [1.0, 10.0], most=2)
    assert [each.updates for each in found] == [2, 2] and found[0].slope > logistic.TOLERANCE
    text = describe([1.0], found[:1])
    assert text == f"updates at C 1 2 (not converged: gradient {found[0].slope:.1e})"
    done = Solution(torch.zeros(K, D), torch.zeros(K), 5, 1e-5)
    assert describe([1e-6, 0.5], [done, done]) == "updates at C 1e-06 5, C 0.5 5"


def test_a_sample_keeps_the_length_of_features():
    sample = PatchSample(2, K, 10, torch.device("cpu"), half=False)
    sample.add(torch.tensor([[3.0, 4.0]]), torch.eye(K)[:1], torch.arange(1))
    assert sample.features.tolist() == [[3.0, 4.0]]
