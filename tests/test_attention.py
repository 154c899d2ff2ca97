"""Attention on grids: what each geometry sees, and that every backend computes it."""

import logging
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from k_diffusion.models import attention
from k_diffusion.models.attention import (
    BACKENDS,
    GlobalAttentionSpec,
    NeighborhoodAttentionSpec,
    ShiftedWindowAttentionSpec,
    attend,
    choose_backend,
    neighborhood,
    tiles,
)


@pytest.fixture(autouse=True)
def no_backend_forced(monkeypatch):
    monkeypatch.delenv(attention.ENV_VAR, raising=False)


def qkv(h, w, n=2, heads=2, e=8, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(n, h, w, heads, e, generator=g, dtype=dtype).requires_grad_() for _ in range(3)
    ]


def dense(geometry, q, k, v):
    """The geometry's mask over all pairs of tokens."""
    mask = geometry.mask(*q.shape[1:3])
    q_, k_, v_ = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    scores = (q_ @ k_.mT).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v_).transpose(1, 2).reshape(q.shape)


def assert_same(run, geometry, inputs, tol):
    """Values and gradients of `run(q, k, v, geometry)` against float64 on all pairs."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = dense(geometry, *exact)
    grad = torch.cos(torch.arange(want.numel(), dtype=torch.float64)).view(want.shape)
    want_grads = torch.autograd.grad(want, exact, grad)
    got = run(*inputs, geometry)
    got_grads = torch.autograd.grad(got, inputs, grad.to(got.dtype))
    for a, b in zip((got, *got_grads), (want, *want_grads)):
        torch.testing.assert_close(
            a.double(), b, rtol=tol, atol=tol * max(1.0, b.abs().max().item())
        )


# ---------------------------------------------------------------- what a token sees


@pytest.mark.parametrize(("length", "k"), [(7, 3), (7, 7), (8, 4), (16, 13), (5, 1)])
def test_a_neighborhood_is_a_window_of_k_keys_clamped_to_the_axis(length, k):
    geometry = NeighborhoodAttentionSpec(8, k)
    h, w = length, length + 2
    mask = geometry.mask(h, w).view(h, w, h, w)
    assert (mask.sum((2, 3)) == k * k).all()
    for i, j in ((0, 0), (length // 2, 1), (h - 1, w - 1), (1, w // 2)):
        top = min(max(i - k // 2, 0), h - k)
        left = min(max(j - k // 2, 0), w - k)
        want = torch.zeros(h, w, dtype=torch.bool)
        want[top : top + k, left : left + k] = True
        assert mask[i, j].equal(want)


def test_a_window_sees_itself_and_a_cut_one_does_not_join_across_the_border():
    mask = ShiftedWindowAttentionSpec(8, 4, shift=2).mask(8, 8).view(8, 8, 8, 8)
    corner = torch.zeros(8, 8, dtype=torch.bool)
    corner[:2, :2] = True
    assert mask[0, 1].equal(corner)
    inner = torch.zeros(8, 8, dtype=torch.bool)
    inner[2:6, 2:6] = True
    assert mask[3, 5].equal(inner)
    assert mask[0, 0, 7, 7].logical_not()
    whole = ShiftedWindowAttentionSpec(8, 4).mask(8, 8).view(8, 8, 8, 8)
    assert whole[5, 1, 4:, :4].all()
    assert whole[5, 1].sum() == 16


def test_a_neighborhood_as_large_as_the_image_is_global():
    def run(q, k, v, geometry):
        return attend(NeighborhoodAttentionSpec(8, 9), q, k, v)

    assert_same(run, GlobalAttentionSpec(8), qkv(9, 9), 1e-5)


# ---------------------------------------------------------------- backends against the reference

PLAIN = [
    (GlobalAttentionSpec(8), (5, 6), "sdpa"),
    (ShiftedWindowAttentionSpec(8, 4), (8, 12), "sdpa"),
    (ShiftedWindowAttentionSpec(8, 4, shift=2), (8, 12), "sdpa"),
    (ShiftedWindowAttentionSpec(8, 5, shift=2), (15, 10), "sdpa"),
    (ShiftedWindowAttentionSpec(8, 8, shift=4), (8, 8), "sdpa"),
    # one dense tile, tiles, and tiles of which the last overlaps the one before
    (NeighborhoodAttentionSpec(8, 3), (7, 11), "tiled"),
    (NeighborhoodAttentionSpec(8, 3), (18, 17), "tiled"),
    (NeighborhoodAttentionSpec(8, 4), (21, 14), "tiled"),
    (NeighborhoodAttentionSpec(8, 5), (40, 7), "tiled"),
    (NeighborhoodAttentionSpec(8, 7), (23, 29), "tiled"),
    (NeighborhoodAttentionSpec(8, 13), (33, 31), "tiled"),
    (NeighborhoodAttentionSpec(8, 13), (13, 70), "tiled"),
    (NeighborhoodAttentionSpec(8, 1), (17, 17), "tiled"),
]
NAMES = [f"{g.name}-{getattr(g, 'kernel_size', '')}-{h}x{w}" for g, (h, w), _ in PLAIN]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("geometry", "size", "name"), PLAIN, ids=NAMES)
def test_plain_backends_agree_with_the_reference(geometry, size, name, dtype):
    tol = 1e-5 if dtype == torch.float32 else 0.02
    inputs = [x.detach().to(dtype).requires_grad_() for x in qkv(*size)]
    assert_same(BACKENDS[geometry.name][name].run, geometry, inputs, tol)


@pytest.mark.parametrize(("geometry", "size", "name"), PLAIN[:6], ids=NAMES[:6])
def test_the_reference_is_the_formula(geometry, size, name):
    assert_same(BACKENDS[geometry.name]["reference"].run, geometry, qkv(*size), 1e-5)


@pytest.mark.parametrize("k", [3, 6, 7])
def test_rows_of_tiles_agree_with_the_reference(monkeypatch, k):
    monkeypatch.setattr(neighborhood, "_MAX_TOKENS_IN_ONE_PLAN", 0)
    for size in ((8, 8), (27, 19), (40, 9)):
        assert_same(neighborhood.tiled, NeighborhoodAttentionSpec(8, k), qkv(*size), 1e-5)


def test_samples_are_cut_into_parts_without_a_trace(monkeypatch):
    geometry, inputs = NeighborhoodAttentionSpec(8, 3), qkv(17, 17, n=5)
    whole = neighborhood.tiled(*inputs, geometry)
    monkeypatch.setattr(tiles, "_NUMBERS_AT_ONCE", 2 * inputs[0][0].numel())
    torch.testing.assert_close(neighborhood.tiled(*inputs, geometry), whole)
    assert_same(neighborhood.tiled, geometry, inputs, 1e-5)


@pytest.mark.parametrize(
    ("geometry", "size"),
    [(NeighborhoodAttentionSpec(2, 3), (17, 16)), (ShiftedWindowAttentionSpec(2, 4, 2), (8, 4))],
)
def test_gradients_by_differences(geometry, size):
    inputs = qkv(*size, n=1, heads=1, e=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda q, k, v: attend(geometry, q, k, v), inputs, fast_mode=True
    )


# ---------------------------------------------------------------- memory, plans


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


def largest(geometry, side, backend):
    inputs = qkv(side, side, n=1, heads=1)
    with LargestTensor() as mode:
        BACKENDS[geometry.name][backend].run(*inputs, geometry).sum().backward()
    return mode.numel


@pytest.mark.parametrize(
    ("geometry", "backend"),
    [(NeighborhoodAttentionSpec(8, 5), "tiled"), (ShiftedWindowAttentionSpec(8, 8, 4), "sdpa")],
)
def test_memory_grows_linearly_forward_and_backward(geometry, backend):
    small, large = largest(geometry, 32, backend), largest(geometry, 96, backend)
    assert large <= 9 * small
    assert large < 0.05 * 96**4
    # the measure itself sees an N x N tensor
    assert largest(geometry, 24, "reference") == 24**4


@pytest.mark.parametrize(
    "geometry", [NeighborhoodAttentionSpec(8, 3), ShiftedWindowAttentionSpec(8, 4, shift=2)]
)
def test_a_plan_made_in_inference_mode_serves_training(geometry):
    inputs = qkv(28, 36)  # a size of this test's own: the plan isn't in the cache yet
    with torch.inference_mode():
        y = attend(geometry, *inputs)
    z = attend(geometry, *inputs)
    z.sum().backward()
    torch.testing.assert_close(z, y)
    assert all(x.grad.isfinite().all() for x in inputs)


def test_plans_are_made_once():
    geometry = NeighborhoodAttentionSpec(8, 3)
    args = (24, 20, geometry, torch.device("cpu"), torch.float32)
    assert neighborhood._plan(*args) is neighborhood._plan(*args)


# ---------------------------------------------------------------- which backend


def test_plain_backends_are_chosen_on_the_cpu_and_the_choice_is_logged(caplog):
    attention._choose.cache_clear()
    with caplog.at_level(logging.DEBUG, logger="k_diffusion"):
        chosen = [
            choose_backend(geometry, "cpu", torch.float32, True)
            for geometry in (
                GlobalAttentionSpec(8),
                NeighborhoodAttentionSpec(8, 3),
                ShiftedWindowAttentionSpec(8, 4),
            )
        ]
    assert chosen == ["sdpa", "tiled", "sdpa"]
    assert "backend sdpa; flash2: needs a CUDA device, got cpu" in caplog.text
    assert "with gradients: backend tiled; natten: " in caplog.text


def test_the_environment_forces_a_backend(monkeypatch, caplog):
    geometry, inputs = NeighborhoodAttentionSpec(8, 3), qkv(17, 17)
    want = attend(geometry, *inputs)
    monkeypatch.setenv(attention.ENV_VAR, "neighborhood=reference, global=sdpa")
    attention._choose.cache_clear()
    with caplog.at_level(logging.DEBUG, logger="k_diffusion"):
        got = attend(geometry, *inputs)
    assert "backend reference (forced)" in caplog.text
    torch.testing.assert_close(got, want)
    assert choose_backend(ShiftedWindowAttentionSpec(8, 4), "cpu", torch.float32, True) == "sdpa"


@pytest.mark.parametrize("setting", ["neighborhood=fast", "tiled", "window=sdpa"])
def test_an_unknown_backend_is_named_beside_those_there_are(monkeypatch, setting):
    monkeypatch.setenv(attention.ENV_VAR, setting)
    with pytest.raises(ValueError, match=rf"no backend '{setting}'.*neighborhood=natten\|tiled\|"):
        attend(GlobalAttentionSpec(8), *qkv(4, 4))


def test_a_forced_backend_that_cannot_run_says_why_and_what_can(monkeypatch):
    monkeypatch.setenv(attention.ENV_VAR, "global=flash2")
    message = (
        "K_DIFFUSION_ATTENTION asks for global=flash2, which can't run here: needs a CUDA device, "
        "got cpu; these can: sdpa, reference"
    )
    with pytest.raises(ValueError) as error:
        attend(GlobalAttentionSpec(8), *qkv(4, 4))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("version", "k", "e", "device", "reason"),
    [
        (None, 3, 8, "cuda", "natten is not installed"),
        ((0, 17), 3, 8, "cuda", "needs natten >= 0.20 .*, got 0.17"),
        ((0, 21), 1, 8, "cuda", "kernel_size >= 2"),
        ((0, 21), 3, 30, "cuda", "d_head to be a multiple of 8, got 30"),
        ((0, 21), 3, 8, "cpu", "no backward on the CPU"),
    ],
)
def test_why_natten_cannot_run(monkeypatch, version, k, e, device, reason):
    monkeypatch.setattr(neighborhood, "_natten_version", lambda: version)
    geometry = NeighborhoodAttentionSpec(e, k)
    why_not = neighborhood.why_not_natten(geometry, device, torch.float32, True)
    assert re.search(reason, why_not)


def test_natten_is_chosen_on_a_gpu_where_it_can_run(monkeypatch):
    monkeypatch.setattr(neighborhood, "_natten_version", lambda: (0, 21))
    attention._choose.cache_clear()
    geometry = NeighborhoodAttentionSpec(16, 3)
    assert choose_backend(geometry, "cuda", torch.bfloat16, True) == "natten"
    assert choose_backend(geometry, "cpu", torch.bfloat16, False) == "tiled"
    attention._choose.cache_clear()


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="kernel_size 7 needs at least 7 x 7 tokens, got 6 x 9"):
        attend(NeighborhoodAttentionSpec(8, 7), *qkv(6, 9))
    message = r"window_size 4 does not divide the 6 x 12 tokens .* that do: \[2, 3, 6\]"
    with pytest.raises(ValueError, match=message):
        attend(ShiftedWindowAttentionSpec(8, 4), *qkv(6, 12))
