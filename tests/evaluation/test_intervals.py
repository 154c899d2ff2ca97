import pytest
import torch
from golden import normal

from k_diffusion.evaluation import Estimate, bootstrap, fid


def test_of_a_mean():
    """Its standard error, and an interval of 1.96 of them to both sides."""
    x = normal(0, (400,)).double()
    got = bootstrap(lambda i: x[i].mean(), [400], resamples=2000)
    assert got.value == x.mean().item()
    assert got.error == pytest.approx(x.std().item() / 20, rel=0.1)
    assert got.high - got.value == pytest.approx(1.96 * got.error, rel=0.1)
    assert got.value - got.low == pytest.approx(1.96 * got.error, rel=0.1)


def test_how_often_it_holds_the_truth():
    held = 0
    for i in range(100):
        x = normal(100 + i, (100,)).exp().double()
        got = bootstrap(lambda at, x=x: x[at].mean(), [100], resamples=200, seed=i)
        held += got.low < torch.tensor(0.5).exp().item() < got.high
    assert 82 <= held <= 99  # of a skewed law: somewhat less than 95


def test_the_spread_of_fid_without_the_shift_of_repeated_samples():
    """The standard deviation over new samples, around a value that they have, too."""
    n, d = 150, 4
    drawn = torch.tensor(
        [fid(normal(200 + i, (n, d)) + 0.3, normal(500 + i, (n, d))) for i in range(40)]
    )
    x, y = normal(200, (n, d)) + 0.3, normal(500, (n, d))
    got = bootstrap(lambda i, j: fid(x[i], y[j]), [n, n], resamples=100)
    assert got.error == pytest.approx(drawn.std().item(), rel=0.4)
    assert got.low < got.value < got.high
    assert got == bootstrap(lambda i, j: fid(x[i], y[j]), [n, n], resamples=100)


def test_no_resamples():
    got = bootstrap(lambda i: 2.0, [3], resamples=0)
    assert got.value == 2
    assert got.error != got.error
    assert str(Estimate(3.2136, 0.0412, 3.1, 3.3)) == "3.214 ± 0.041"
