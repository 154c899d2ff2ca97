import math

import pytest
import torch
from golden import normal

from k_diffusion.evaluation import neighbors, prdc


def means(scores):
    return [part.mean().item() for part in scores]


def by_definition(fake, real, k):
    """Over the matrix of all pairs."""
    between = torch.cdist(fake, real)
    radii = [torch.cdist(z, z).sort(1).values[:, k] for z in (fake, real)]
    inside = between <= radii[1]
    return [
        inside.any(1).double().mean().item(),
        (between <= radii[0][:, None]).any(0).double().mean().item(),
        inside.sum().item() / (k * len(fake)),
        (between.min(0).values <= radii[1]).double().mean().item(),
    ]


@pytest.mark.parametrize("block", [1 << 24, 100])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_against_all_pairs(k, block, monkeypatch):
    monkeypatch.setattr(neighbors, "_BLOCK", block)
    fake, real = normal(0, (60, 4)).double() * 1.3, normal(1, (45, 4)).double() + 0.5
    assert means(prdc(fake, real, k)) == pytest.approx(by_definition(fake, real, k), rel=1e-12)


def test_against_torch_fidelity():
    """Its precision and recall, which are the two of k = 3."""
    fidelity = pytest.importorskip("torch_fidelity.metric_prc")
    fake, real = normal(2, (50, 5)), normal(3, (50, 5)) * 1.2
    precision, recall = fidelity.calculate_precision_recall_full(fake, real, 3)
    got = prdc(fake, real, 3)
    assert got.precision.mean().item() == pytest.approx(precision)
    assert got.recall.mean().item() == pytest.approx(recall)


def test_identical_and_distant_sets():
    x = normal(4, (40, 3))
    precision, recall, density, coverage = means(prdc(x, x, 5))
    assert (precision, recall, coverage) == (1, 1, 1)
    # each sample is in its own ball and in those of as many others as have it among their 5
    assert density == pytest.approx(1 + 1 / 5)
    assert means(prdc(x + 100, x, 5)) == [0, 0, 0, 0]


def test_one_mode_of_two():
    """Fakes of one of two equal modes: precise, covering half."""
    modes = normal(5, (400, 2)) + torch.tensor([0.0, 100.0]).repeat_interleave(200)[:, None]
    precision, recall, _, coverage = means(prdc(normal(6, (400, 2)), modes, 5))
    assert precision > 0.95
    assert recall == pytest.approx(0.5, abs=0.03)
    assert coverage == pytest.approx(0.5, abs=0.03)


def test_coverage_of_equal_laws():
    """1 - (n - 1) ... (n - k) / ((2 n - 1) ... (2 n - k)), in expectation, for n of each."""
    n, k = 200, 3
    want = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    values = torch.tensor(
        [prdc(normal(10 + i, (n, 3)), normal(50 + i, (n, 3)), k).coverage.mean() for i in range(30)]
    )
    assert values.mean().item() == pytest.approx(want, abs=4 * values.std().item() / 30**0.5)


def test_far_features_lose_no_digits():
    fake, real = normal(7, (60, 4)).double(), normal(8, (45, 4)).double()
    shifted = prdc(fake + 1e6, real + 1e6, 3)
    assert means(shifted) == means(prdc(fake, real, 3))


def test_bad_input():
    x = normal(9, (5, 3))
    with pytest.raises(ValueError, match="with k = 5 need at least 6 samples .* got 5 and 5"):
        prdc(x, x)
    with pytest.raises(ValueError, match="k >= 1"):
        prdc(x, x, 0)
    with pytest.raises(ValueError, match="width"):
        prdc(x, x[:, :2], 1)
