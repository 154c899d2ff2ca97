"""What the attention tests share: inputs, the formula in float64, the comparison with it."""

import contextlib

import torch

from k_diffusion.models.attention import choice, flash, flex, natten


def forget():
    """Empties what the choice of a backend remembers of the machine."""
    for cached in (
        choice._choose,
        choice.why_not_imported,
        natten.version,
        flash._capability,
        flex._why_no_cpp,
    ):
        with contextlib.suppress(AttributeError):  # a test has put something else in its place
            cached.cache_clear()


def qkv(h, w, n=2, heads=2, e=8, dtype=torch.float32, grad=True):
    """Queries, keys and values, (n, h, w, heads, e), whose dot products are of the order of 1."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, h, w, heads, e, generator=g, dtype=torch.float64) for _ in range(3))
    scale = 1.5 * e**-0.25
    return [x.to(dtype).requires_grad_(grad) for x in (q * scale, k * scale, v)]


def formula(geometry, q, k, v):
    """Softmax attention over all pairs of tokens that the geometry's mask allows."""
    mask = geometry.mask(*q.shape[1:3])
    q_, k_, v_ = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    scores = (q_ @ k_.mT).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v_).transpose(1, 2).reshape(q.shape)


def assert_same(run, geometry, inputs, tol):
    """`run(q, k, v, geometry)` and, where inputs require them, gradients against the formula in
    float64. tol: relative to the largest number of each, of at least 1."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = [formula(geometry, *exact)]
    got = [run(*inputs, geometry)]
    assert got[0].dtype == inputs[0].dtype
    assert got[0].shape == inputs[0].shape
    if inputs[0].requires_grad:
        grad = torch.cos(torch.arange(got[0].numel())).view_as(got[0]).to(got[0].dtype)
        want += torch.autograd.grad(want[0], exact, grad.double())
        got += torch.autograd.grad(got[0], inputs, grad)
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tol * max(1, b.abs().max().item()))
