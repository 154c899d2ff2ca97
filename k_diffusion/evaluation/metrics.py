"""Distances between sets of features, and the inception score; in float64 throughout.

x and y are features (n, d) of images, from one encoder. Results are tensors (), in the features'
dtype but at least float32, or estimates with an interval.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common.tensors import in_float64, wide
from .intervals import Estimate, with_error
from .statistics import FeatureStatistics, check_alike, check_features

FeatureSet = Tensor | FeatureStatistics


def _pair(x: Tensor, y: Tensor, least: int, what: str) -> tuple[Tensor, Tensor]:
    """Two sets of features in float64. Raises ValueError where they are too few or don't match."""
    check_alike(x, y)
    x, y = check_features("x", x), check_features("y", y)
    if min(len(x), len(y)) < least:
        raise ValueError(
            f"{what} needs at least {least} samples of each set, got {len(x)} and {len(y)}; draw "
            "more"
        )
    return in_float64(x), in_float64(y)


# --------------------------------------------------------------------------- kernel distances


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """KID's kernel (x · y / d + 1)³, (n, m). x: (n, d). y: (m, d)."""
    return (x @ y.mT / x.shape[-1] + 1) ** 3


def squared_mmd(
    x: Tensor, y: Tensor, kernel: Callable[[Tensor, Tensor], Tensor] = polynomial_kernel
) -> Tensor:
    """The squared maximum mean discrepancy, unbiased, (); below 0 by chance for close sets.

    x: (n, d). y: (m, d). kernel: features (n, d), (m, d) -> (n, m). Equation 3 of Gretton et al.,
    2012. Raises ValueError for fewer than 2 samples.
    """
    dtype = wide(x.dtype)
    x, y = _pair(x, y, 2, "the squared MMD")

    def within(z: Tensor) -> Tensor:
        k = kernel(z, z)
        return (k.sum() - k.trace()) / (len(z) * (len(z) - 1))

    return (within(x) + within(y) - 2 * kernel(x, y).mean()).to(dtype)


def kid(x: Tensor, y: Tensor, max_size: int = 5000) -> Tensor:
    """The kernel inception distance (arXiv:1801.01401), (), in parts of at most max_size samples.

    x: (n, d). y: (m, d). Both are cut into as many parts, whose squared MMDs are averaged: memory
    doesn't grow with n, and the mean stays unbiased. Raises ValueError for fewer than 2 samples per
    part.
    """
    parts = math.ceil(max(len(x), len(y)) / max_size)
    pairs = zip(x.tensor_split(parts), y.tensor_split(parts))
    return torch.stack([squared_mmd(a, b) for a, b in pairs]).mean()


def kid_subsets(
    x: Tensor, y: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0
) -> Estimate:
    """KID as published tables have it: the mean over random subsets, with its standard error.

    x: (n, d). y: (m, d). size: of a subset, drawn from each set without replacement. The error is
    that of the mean over subsets. Raises ValueError for sets of fewer than `size` samples.
    """
    x, y = _pair(x.detach(), y.detach(), size, f"KID of subsets of {size}")
    generator = torch.Generator().manual_seed(seed)

    def draw(z: Tensor) -> Tensor:
        return z[torch.randperm(len(z), generator=generator)[:size].to(z.device)]

    values = torch.stack([squared_mmd(draw(x), draw(y)) for _ in range(subsets)])
    return with_error(float(values.mean()), float(values.std() / math.sqrt(subsets)))


def cmmd(x: Tensor, y: Tensor, sigma: float = 10.0) -> Tensor:
    """CMMD (arXiv:2401.09603), (): 1,000 times the biased squared MMD with a Gaussian kernel.

    x: (n, d). y: (m, d); unit vectors, of CLIP. sigma: the kernel's width. Kernels come block by
    block.
    """
    dtype = wide(x.dtype)
    x, y = _pair(x, y, 2, "CMMD")

    def mean(a: Tensor, b: Tensor) -> Tensor:
        total = a.new_zeros(())
        squares = b.square().sum(1)
        for rows in a.split(1024):
            distances = rows.square().sum(1)[:, None] + squares - 2 * rows @ b.mT
            total = total + torch.exp(distances / (-2 * sigma**2)).sum()
        return total / (len(a) * len(b))

    return (1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))).to(dtype)


# -------------------------------------------------------------------------- Fréchet distances


class _SquareRoot(torch.autograd.Function):
    """The square root R of a symmetric matrix. dR solves R dR + dR R = dA: its gradient divides by
    sums of roots, where that of the eigenvectors divides by differences of eigenvalues."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(a)
        roots = values.abs().sqrt()
        ctx.save_for_backward(roots, vectors)
        return (vectors * roots[..., None, :]) @ vectors.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        roots, vectors = ctx.saved_tensors
        sums = roots[..., :, None] + roots[..., None, :]
        inner = (vectors.mT @ (grad + grad.mT) @ vectors / 2) / sums.where(sums > 0, torch.inf)
        return vectors @ inner @ vectors.mT


def sqrtm_eig(a: Tensor) -> Tensor:
    """The square root of symmetric positive semi-definite matrices, by eigenvalues.

    a: (..., d, d). Eigenvalues that rounding made negative count by their size. The gradient is
    finite also where eigenvalues are equal or 0. Raises ValueError unless a is square.
    """
    if a.ndim < 2 or a.shape[-1] != a.shape[-2]:
        raise ValueError(f"sqrtm_eig needs square matrices (..., d, d), got {tuple(a.shape)}")
    root: Tensor = _SquareRoot.apply(in_float64(a))
    return root.to(a)


class _Gaussian(NamedTuple):
    """What the Fréchet distance needs of a set: its mean, the trace of its covariance, and a factor
    F (d, r) of it, F Fᵀ = covariance."""

    mean: Tensor
    trace: Tensor
    factor: Tensor


def _factor(covariance: Tensor) -> Tensor:
    """A factor of a covariance; its numerical range alone, where it isn't of full rank."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return factor
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def _gaussian(x: FeatureSet) -> _Gaussian:
    """The Gaussian of features, (n, d), or of statistics. Raises ValueError for n < 2."""
    n = x.n if isinstance(x, FeatureStatistics) else len(check_features("features", x))
    if n is not None and n < 2:
        raise ValueError(f"a Fréchet distance needs at least 2 samples of each set, got {n}")
    if isinstance(x, Tensor):
        if len(x) > x.shape[1]:
            x = FeatureStatistics(x.shape[1], device=x.device).update(x)
        else:  # fewer samples than features: they are a factor themselves
            x = in_float64(x)
            mean = x.mean(0)
            factor = (x - mean).mT / math.sqrt(len(x) - 1)
            return _Gaussian(mean, factor.square().sum(), factor)
    covariance = x.covariance
    return _Gaussian(x.mean, covariance.trace(), _factor(covariance))


def _nuclear_norm(m: Tensor) -> Tensor:
    """The sum of the singular values.

    They are the roots of the eigenvalues of mᵀ m, which take a third of the time. Rounding moves
    these by about eps times the largest. Where that shows, singular values are computed as such.
    """
    if not m.numel():  # all of one set are the same
        return m.new_zeros(())
    m = m if m.shape[0] >= m.shape[1] else m.mT
    squares = torch.linalg.eigvalsh(m.mT @ m)
    roots = squares.clamp(min=0).sqrt()
    noise = squares[-1] * torch.finfo(m.dtype).eps
    errors = torch.minimum(noise / (2 * roots), noise.sqrt())
    if errors.nan_to_num().norm() <= 1e-9 * roots.sum():
        return roots.sum()
    return torch.linalg.svdvals(m).sum()


def _distance(a: _Gaussian, b: _Gaussian) -> Tensor:
    shift = (a.mean - b.mean).square().sum()
    distance = shift + a.trace + b.trace - 2 * _nuclear_norm(a.factor.mT @ b.factor)
    return distance.clamp(min=0)  # what rounding leaves of 0


@torch.no_grad()
def frechet_distance(x: FeatureSet, y: FeatureSet) -> Tensor:
    """The squared Fréchet distance between the Gaussians of two sets, (), in float64.

    x: (n, d), or its statistics. y: (m, d), or its statistics. |mu_x - mu_y|² + tr(S_x + S_y - 2
    (S_x S_y)^(1/2)), where with S = F Fᵀ the last trace is the sum of the singular values of F_xᵀ
    F_y: no root of a matrix is taken, and fewer samples than features do no harm. Raises ValueError
    for other widths or protocols, or fewer than 2 samples.
    """
    check_alike(x, y)
    a, b = _gaussian(x), _gaussian(y)
    return _distance(a, _Gaussian(*(part.to(a.mean.device) for part in b)))


class _TraceOfRoot(torch.autograd.Function):
    """tr (a b)^(1/2) of two covariances.

    With a = F Fᵀ, b = G Gᵀ and Fᵀ G = U S Vᵀ it is tr S, and its gradient by a is (G V) S⁻¹ (G V)ᵀ
    / 2. eps is the least singular value that the gradient divides by.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, eps: float) -> Tensor:
        f, g = _factor(a), _factor(b)
        ctx.save_for_backward(f, g)
        ctx.eps = eps
        return _nuclear_norm(f.mT @ g)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        f, g = ctx.saved_tensors
        u, s, vt = torch.linalg.svd(f.mT @ g, full_matrices=False)
        weight = grad / (2 * s.clamp(min=ctx.eps))
        by_a, by_b = g @ vt.mT, f @ u
        return (by_a * weight) @ by_a.mT, (by_b * weight) @ by_b.mT, None


def _covariance(x: Tensor) -> Tensor:
    x = x - x.mean(0)
    return x.mT @ x / (len(x) - 1)


def fid(x: Tensor, y: Tensor, eps: float = 1e-8) -> Tensor:
    """The Fréchet (inception) distance of two sets of features, (), with gradients.

    x: (n, d). y: (m, d). eps: bounds the gradient where a covariance isn't of full rank; the value
    doesn't depend on it. `frechet_distance` says how it is computed. Raises ValueError for fewer
    than 2 samples, other widths, NaN or infinity.
    """
    dtype = wide(x.dtype)
    if not (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)):
        return frechet_distance(x, y).to(dtype)
    x, y = _pair(x, y, 2, "a Fréchet distance")
    a, b = _covariance(x), _covariance(y)
    shift = (x.mean(0) - y.mean(0)).square().sum()
    return (shift + a.trace() + b.trace() - 2 * _TraceOfRoot.apply(a, b, eps)).to(dtype)


def fd_infinity(x: Tensor, y: FeatureSet, sizes: int = 15, seed: int = 0) -> Estimate:
    """The Fréchet distance extrapolated to infinitely many samples of x (arXiv:1911.07023).

    x: (n, d). y: (m, d), or its statistics; all of it counts each time. sizes: how many random
    parts of x are measured, of min(5,000, n / 10) to n samples. Their distances are linear in 1 /
    size, nearly; the line's value at 0 is returned with the regression's error. Raises ValueError
    for fewer than 20 samples of x.
    """
    n = len(x)
    if n < 20 or sizes < 3:
        raise ValueError(
            f"FD at infinity needs at least 20 samples and 3 sizes, got {n} and {sizes}; draw more"
        )
    check_alike(x, y)
    reference = _gaussian(y.detach() if isinstance(y, Tensor) else y)
    generator = torch.Generator().manual_seed(seed)
    counts = torch.linspace(min(5000, n / 10), n, sizes, dtype=torch.float64).round().long()
    distances = torch.stack(
        [
            _distance(reference, _gaussian(x.detach()[order[:count].to(x.device)])).cpu()
            for count in counts
            for order in [torch.randperm(n, generator=generator)]
        ]
    )
    inverse = 1 / counts.double()
    spread = inverse - inverse.mean()
    slope = (spread * distances).sum() / spread.square().sum()
    left = distances - distances.mean() - slope * spread
    variance = left.square().sum() / (sizes - 2)
    at_0 = distances.mean() - slope * inverse.mean()
    error = (variance * (1 / sizes + inverse.mean() ** 2 / spread.square().sum())).sqrt()
    from scipy.stats import t

    return with_error(float(at_0), float(error), float(t.ppf(0.975, sizes - 2)))


# ---------------------------------------------------------------------------- inception score


def inception_score(logits: Tensor, split_size: int = 5000) -> Tensor:
    """The inception score (arXiv:1606.03498), (): exp of the mean KL(p(class | image) || p(class)).

    logits: (n, classes), of a classifier. split_size: the score is averaged over parts of so many
    images, as ADM's is. Raises ValueError for fewer than 2 images.
    """
    if len(logits) < 2:
        raise ValueError(f"an inception score needs at least 2 images, got {len(logits)}")
    logs = in_float64(check_features("logits", logits)).log_softmax(1)

    def score(part: Tensor) -> Tensor:
        marginal = part.logsumexp(0) - math.log(len(part))
        return (part.exp() * (part - marginal)).sum(1).mean().exp()

    return (
        torch.stack([score(part) for part in logs.split(split_size)]).mean().to(wide(logits.dtype))
    )
