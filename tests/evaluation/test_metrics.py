"""Metrics against closed forms, and against other implementations' formulas."""

import golden
import numpy as np
import pytest
import scipy
import torch
from golden import normal

from k_diffusion import evaluation as E
from k_diffusion.evaluation import metrics


def features(seed, n, d, scale=1.0, shift=0.0, dtype=torch.float64):
    return (normal(seed, (n, d)) * scale + shift).to(dtype)


def with_moments(seed, n, mean, covariance):
    """Samples whose mean and covariance are exactly those given."""
    x = normal(seed, (n, len(mean))).double()
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(torch.cov(x.T)).T, x, upper=True, left=False
    )
    return white @ torch.linalg.cholesky(covariance).T + mean


def spd(seed, d):
    a = normal(seed, (d, d)).double()
    return a @ a.T / d + 0.1 * torch.eye(d)


# ------------------------------------------------------------------------ Fréchet distance


def test_fid_of_gaussians_that_commute():
    """|mu|² + sum (s_x - s_y)² for covariances with common axes."""
    d = 6
    axes = torch.linalg.qr(normal(0, (d, d)).double())[0]
    s, t = torch.linspace(0.5, 2, d).double(), torch.linspace(1.5, 0.2, d).double()
    mu = torch.linspace(-1, 1, d).double()
    x = with_moments(1, 50, mu, axes * s**2 @ axes.T)
    y = with_moments(2, 40, 0 * mu, axes * t**2 @ axes.T)
    want = mu.square().sum() + (s - t).square().sum()
    assert E.fid(x, y).item() == pytest.approx(want.item(), rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(60, 50), (7, 50), (60, 7), (7, 9)])
def test_fid_against_scipys_square_root(n, m):
    x, y = features(3, n, 16, 1.3, 0.2), features(4, m, 16)
    a, b = np.cov(x.T.numpy()), np.cov(y.T.numpy())
    # of full rank, as sqrtm needs it; the error that this brings is about sqrt of the ridge
    ridge = 1e-12 * np.eye(16) if min(n, m) <= 16 else 0
    root = scipy.linalg.sqrtm((a + ridge) @ (b + ridge)).real
    want = (x.mean(0) - y.mean(0)).square().sum() + np.trace(a) + np.trace(b) - 2 * np.trace(root)
    assert E.fid(x, y).item() == pytest.approx(want.item(), abs=1e-9 if min(n, m) > 16 else 1e-4)


def test_fid_against_the_eigenvalues_of_the_product():
    """torchmetrics' and torch-fidelity's formula."""
    x, y = features(5, 80, 12, 1.5), features(6, 90, 12, 1.0, 0.3)
    a, b = torch.cov(x.T), torch.cov(y.T)
    root = torch.linalg.eigvals(a @ b).sqrt().real.sum()
    want = (x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * root
    assert E.fid(x, y).item() == pytest.approx(want.item(), rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(300, 64), (20, 64), (64, 64), (2, 64), (300, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fid_of_identical_sets_is_0(n, d, dtype):
    # standard deviations over six decades, as features have them
    x = features(7, n, d, 5 * torch.logspace(0, -6, d), 3.0, dtype)
    assert 0 <= E.fid(x, x).item() < 1e-6
    assert E.fid(x, x).dtype == dtype
    y = x.clone().requires_grad_()
    assert abs(E.fid(y, x).item()) < 1e-6
    assert torch.autograd.grad(E.fid(y, x), y)[0].isfinite().all()


def test_fid_of_a_set_that_is_one_point():
    """Its covariance is 0: what remains is the other's trace, and the shift."""
    x, y = features(0, 12, 4), torch.ones(9, 4, dtype=torch.float64)
    wanted = torch.cov(x.T).trace() + (x.mean(0) - 1).square().sum()
    torch.testing.assert_close(E.fid(x, y), wanted)
    torch.testing.assert_close(E.fid(y, x), wanted)
    assert E.fid(y, y) == 0
    distance = E.fid(x.requires_grad_(), y)
    distance.backward()
    torch.testing.assert_close(distance.detach(), wanted.detach())
    torch.testing.assert_close(x.grad, 2 * (x - x.mean(0)) / 11 + 2 * (x.mean(0) - 1) / 12)


def test_the_bias_of_fid_with_n():
    """About 2 d / n + d (d + 1) / (2 n) for n samples a side of one Gaussian."""
    d, n = 8, 400
    values = torch.stack(
        [E.fid(features(100 + i, n, d), features(500 + i, n, d)) for i in range(60)]
    )
    want = 2 * d / n + d * (d + 1) / (2 * n)
    assert values.mean().item() == pytest.approx(
        want, abs=4 * values.std().item() / 60**0.5 + 0.002
    )


def test_constant_features_are_fine():
    x, y = features(8, 30, 5), features(9, 40, 5)
    x[:, 2] = y[:, 2] = 4.0
    kept = [0, 1, 3, 4]
    assert E.fid(x, y).item() == pytest.approx(E.fid(x[:, kept], y[:, kept]).item(), rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(12, 10), (5, 9)])
def test_gradients_of_fid(n, m):
    x, y = features(10, n, 4).requires_grad_(), features(11, m, 4, 1.4, 0.3).requires_grad_()
    assert torch.autograd.gradcheck(E.fid, (x, y))
    with torch.no_grad():
        value = E.fid(x, y)
    torch.testing.assert_close(E.fid(x, y), value)


def test_gradients_of_fid_with_fewer_samples_than_features():
    """The set moves towards the other one, and no gradient is NaN."""
    x, y = features(12, 6, 20).requires_grad_(), features(13, 8, 20)
    value = E.fid(x, y)
    (grad,) = torch.autograd.grad(value, x)
    assert grad.isfinite().all()
    with torch.no_grad():
        change = E.fid(x - 1e-4 * grad, y) - value
    assert change.item() == pytest.approx(-1e-4 * grad.square().sum().item(), rel=0.01)


@pytest.mark.parametrize("n", [50, 7])
def test_singular_values_by_either_way(n, monkeypatch):
    m = features(14, n, 10) * torch.logspace(0, -9, 10).double()
    want = torch.linalg.svdvals(m).sum()
    torch.testing.assert_close(metrics._nuclear_norm(m), want, rtol=1e-9, atol=0)
    m = features(15, n, 10)
    monkeypatch.setattr(torch.linalg, "svdvals", None)  # well-conditioned ones don't need it
    want = torch.linalg.svd(m).S.sum()
    torch.testing.assert_close(metrics._nuclear_norm(m), want, rtol=1e-12, atol=0)


def test_square_roots():
    a = torch.stack([spd(16, 5), spd(17, 5)])
    root = E.sqrtm_eig(a)
    torch.testing.assert_close(root @ root, a)
    torch.testing.assert_close(root, root.mT)
    want = scipy.linalg.sqrtm(a[0].numpy())
    torch.testing.assert_close(root[0], torch.from_numpy(want).real)
    assert E.sqrtm_eig(a.float()).dtype == torch.float32

    def of_symmetric(b):
        return E.sqrtm_eig((b + b.mT) / 2)

    assert torch.autograd.gradcheck(of_symmetric, a.clone().requires_grad_())
    # equal eigenvalues, and 0: d sqrt = d a / 2 at the identity
    eye = torch.eye(3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(E.sqrtm_eig(eye).trace(), eye)
    torch.testing.assert_close(grad, torch.eye(3).double() / 2)
    zero = torch.zeros(3, 3, requires_grad=True)
    assert torch.autograd.grad(E.sqrtm_eig(zero).sum(), zero)[0].isfinite().all()
    with pytest.raises(ValueError, match="square matrices"):
        E.sqrtm_eig(torch.zeros(2, 3))


# --------------------------------------------------------------------------- at infinite n


def test_fd_at_infinity_takes_the_bias_away():
    d = 12
    known = E.FeatureStatistics.from_moments(torch.zeros(d), 1.1**2 * torch.eye(d), 10**6)
    true = d * 0.1**2
    sets = [features(20 + i, 2000, d) for i in range(20)]
    extrapolated = [E.fd_infinity(x, known) for x in sets]
    plain = sum(E.frechet_distance(x, known).item() for x in sets) / 20
    bias = plain - true
    assert bias > 0.02
    assert sum(e.value for e in extrapolated) / 20 == pytest.approx(true, abs=0.3 * bias)
    assert all(e.low < e.value < e.high for e in extrapolated)


def test_the_regression_is_that_of_scipy(monkeypatch):
    seen = []
    distance = metrics._distance

    def record(a, b):
        seen.append(distance(a, b))
        return seen[-1]

    monkeypatch.setattr(metrics, "_distance", record)
    x, y = features(22, 200, 6), features(23, 100, 6)
    got = E.fd_infinity(x, y, seed=3)
    sizes = np.linspace(20, 200, 15).round()
    line = scipy.stats.linregress(1 / sizes, torch.stack(seen).numpy())
    assert got.value == pytest.approx(line.intercept)
    assert got.error == pytest.approx(line.intercept_stderr)
    t = scipy.stats.t.ppf(0.975, 13)
    assert got.high == pytest.approx(line.intercept + t * line.intercept_stderr)


# -------------------------------------------------------------------------- kernel distances


def test_squared_mmd_by_definition():
    x, y = features(30, 7, 3), features(31, 5, 3)

    def k(a, b):
        return ((a @ b) / 3 + 1) ** 3

    xx = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / 42
    yy = sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / 20
    xy = sum(k(a, b) for a in x for b in y) / 35
    torch.testing.assert_close(E.squared_mmd(x, y), xx + yy - 2 * xy)


def test_kid_of_gaussians():
    """3 |S_1 - S_2|² / d² for zero means, of the kernel's quadratic part, and no more in the limit
    of small covariances."""
    d, n, s, t = 4, 20000, 0.05, 0.2
    x, y = features(32, n, d, s), features(33, n, d, t)
    values = torch.stack([E.squared_mmd(a, b) for a, b in zip(x.split(1000), y.split(1000))])
    want = 3 * d * (s**2 - t**2) ** 2 / d**2
    assert values.mean().item() == pytest.approx(want, abs=4 * values.std().item() / 20**0.5)
    assert want > 4 * values.std().item() / 20**0.5
    torch.testing.assert_close(E.kid(x, y, max_size=1000), values.mean())


def test_kid_is_unbiased():
    values = torch.stack(
        [E.squared_mmd(features(600 + i, 10, 4), features(900 + i, 12, 4)) for i in range(300)]
    )
    assert abs(values.mean().item()) < 4 * values.std().item() / 300**0.5
    assert (values < 0).any()


def test_kid_against_torch_fidelity():
    fidelity = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = features(34, 40, 6), features(35, 40, 6, 1.2)
    kernel = {
        "kid_kernel_poly_degree": 3,
        "kid_kernel_poly_gamma": None,
        "kid_kernel_poly_coef0": 1,
    }
    parts = [
        fidelity.kernel_poly(a.numpy(), b.numpy(), **kernel) for a, b in ((x, x), (x, y), (y, y))
    ]
    assert E.squared_mmd(x, y).item() == pytest.approx(fidelity.mmd2(*parts))


class Features(torch.nn.Module):
    """In place of torchmetrics' Inception: its "images" are features already."""

    num_features = 6

    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore")  # on memory, and on one split's deviation
def test_against_torchmetrics():
    image = pytest.importorskip("torchmetrics.image")
    from torchmetrics.image.inception import InceptionScore

    network = Features()
    x, y = features(34, 90, 6), features(35, 70, 6, 1.2, 0.3)
    fid = image.FrechetInceptionDistance(network, normalize=False).set_dtype(torch.float64)
    kid = image.KernelInceptionDistance(network, subsets=1, subset_size=70)
    for batch in x.split(32):  # in a stream
        fid.update(batch, real=False)
    for batch in y.split(32):
        fid.update(batch, real=True)
    kid.update(x[:70], real=False)
    kid.update(y, real=True)
    assert E.fid(x, y).item() == pytest.approx(fid.compute().item(), rel=1e-9)
    assert E.squared_mmd(x[:70], y).item() == pytest.approx(kid.compute()[0].item(), rel=1e-5)
    score = InceptionScore(network, splits=1)
    score.update(x)
    assert E.inception_score(x).item() == pytest.approx(score.compute()[0].item(), rel=1e-6)


def test_kid_of_subsets():
    x, y = features(36, 300, 5), features(37, 400, 5, 1.5)
    got = E.kid_subsets(x, y, subsets=50, size=100)
    assert got.value == pytest.approx(E.squared_mmd(x, y).item(), abs=5 * got.error)
    assert got == E.kid_subsets(x, y, subsets=50, size=100)
    assert got != E.kid_subsets(x, y, subsets=50, size=100, seed=1)
    # subsets that are the whole sets have no spread
    whole = E.kid_subsets(x, x + 1, subsets=3, size=300)
    assert whole.error < 1e-12 * whole.value
    assert whole.value == pytest.approx(E.squared_mmd(x, x + 1).item())


def test_gradients_of_kid():
    x, y = features(38, 5, 3).requires_grad_(), features(39, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(E.kid, (x, y))
    assert torch.autograd.gradcheck(E.polynomial_kernel, (x, y))


def test_cmmd_against_all_pairs():
    def kernel(a, b):
        return torch.from_numpy(np.exp(-scipy.spatial.distance.cdist(a, b, "sqeuclidean") / 200))

    x, y = features(40, 1500, 6), features(41, 30, 6, 1.0, 0.5)  # in two blocks
    x, y = (torch.nn.functional.normalize(z) for z in (x, y))
    want = 1000 * (kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean())
    assert E.cmmd(x, y).item() == pytest.approx(want.item(), rel=1e-9)
    assert E.cmmd(x, x).item() == pytest.approx(0, abs=1e-9)


def test_cmmd_of_two_points():
    x = torch.tensor([[1.0, 0.0]]).repeat(2, 1)
    y = -x
    # distance 2, so that the kernel is exp(-4 / 200)
    assert E.cmmd(x, y).item() == pytest.approx(2000 * (1 - np.exp(-0.02)), rel=1e-6)


# -------------------------------------------------------------------------- inception score


def test_inception_score():
    classes = torch.eye(4).repeat(5, 1) * 50
    assert E.inception_score(classes).item() == pytest.approx(4)
    assert E.inception_score(torch.zeros(20, 4)).item() == pytest.approx(1)
    assert E.inception_score(classes, split_size=4).item() == pytest.approx(4)
    logits = features(50, 100, 7, 2.0)
    p = logits.softmax(1).numpy()
    want = np.exp(scipy.stats.entropy(p, p.mean(0, keepdims=True), axis=1).mean())
    assert E.inception_score(logits).item() == pytest.approx(want)
    halves = [E.inception_score(half) for half in logits.split(50)]
    assert E.inception_score(logits, 50).item() == pytest.approx(torch.stack(halves).mean().item())


# ------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("metric", [E.fid, E.squared_mmd, E.cmmd, E.frechet_distance])
def test_bad_input(metric):
    x = features(60, 5, 3)
    with pytest.raises(ValueError, match="needs at least 2 samples of each set, got"):
        metric(x, x[:1])
    with pytest.raises(ValueError, match="features of width 3 can't be compared with features of"):
        metric(x, features(61, 5, 4))
    with pytest.raises(ValueError, match="NaN or infinity"):
        metric(x.where(x < 1, torch.nan), x)
    with pytest.raises(ValueError, match=r"must have shape \(n, width\)|width"):
        metric(x[0], x[0])


def test_too_few_for_extrapolation_subsets_and_score():
    x = features(62, 19, 3)
    with pytest.raises(ValueError, match="at least 20 samples and 3 sizes, got 19"):
        E.fd_infinity(x, x)
    with pytest.raises(
        ValueError, match="KID of subsets of 1000 needs at least 1000 .* got 19 and 19"
    ):
        E.kid_subsets(x, x)
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        E.inception_score(x[:1])


def test_published_numbers():
    want, _ = golden.load("fid_kid")
    x, y = normal(80, (200, 16)), normal(81, (300, 16)) * 1.3 + 0.2
    assert E.fid(x, y).item() == pytest.approx(want["fid"].item(), rel=1e-5)
    assert E.kid(x, y, max_size=64).item() == pytest.approx(want["kid_parts"].item(), rel=1e-4)
