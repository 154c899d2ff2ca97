"""Attention on grids: what each geometry sees, and that the plain backends compute it."""

import pytest
import torch
from attention_oracle import assert_same, formula, qkv
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from k_diffusion.models import attention
from k_diffusion.models.attention import (
    BACKENDS,
    GlobalAttentionSpec,
    NeighborhoodAttentionSpec,
    ShiftedWindowAttentionSpec,
    attend,
    flex,
    neighborhood,
    tiles,
)


@pytest.fixture(autouse=True)
def no_backend_forced(monkeypatch):
    monkeypatch.delenv(attention.ENV_VAR, raising=False)


# ---------------------------------------------------------------- what a token sees


@pytest.mark.parametrize(
    ("length", "k"), [(7, 3), (7, 7), (8, 4), (9, 2), (16, 13), (13, 12), (5, 1)]
)
def test_a_neighborhood_is_a_window_of_k_keys_clamped_to_the_axis(length, k):
    geometry = NeighborhoodAttentionSpec(8, k)
    h, w = length, length + 2
    mask = geometry.mask(h, w).view(h, w, h, w)
    for i in range(h):
        for j in range(w):
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


def test_equal_keys_give_the_mean_of_the_values_that_are_seen():
    q, k, v = qkv(19, 18, n=1, heads=1, grad=False)
    for geometry in (NeighborhoodAttentionSpec(8, 5), ShiftedWindowAttentionSpec(8, 1)):
        seen = geometry.mask(19, 18).float()
        mean = (seen @ v.flatten(0, 3)) / seen.sum(dim=1, keepdim=True)
        y = attend(geometry, q, torch.ones_like(k), v)
        torch.testing.assert_close(y.flatten(0, 3), mean)


# ---------------------------------------------------------------- backends against the formula

CASES = [
    (GlobalAttentionSpec(16), (5, 6)),
    (GlobalAttentionSpec(24), (9, 7)),
    (GlobalAttentionSpec(32), (13, 1)),
    (GlobalAttentionSpec(64), (1, 1)),
    (GlobalAttentionSpec(128), (11, 18)),
    (ShiftedWindowAttentionSpec(16, 4), (8, 12)),
    (ShiftedWindowAttentionSpec(24, 4, shift=2), (8, 20)),
    (ShiftedWindowAttentionSpec(32, 5, shift=2), (15, 10)),
    (ShiftedWindowAttentionSpec(64, 8, shift=4), (8, 8)),
    (ShiftedWindowAttentionSpec(128, 3, shift=1), (9, 21)),
    (ShiftedWindowAttentionSpec(16, 1), (3, 5)),
    # one dense tile, tiles, and tiles of which the last overlaps the one before
    (NeighborhoodAttentionSpec(16, 1), (17, 17)),
    (NeighborhoodAttentionSpec(24, 2), (18, 21)),
    (NeighborhoodAttentionSpec(16, 3), (7, 11)),
    (NeighborhoodAttentionSpec(24, 3), (18, 17)),
    (NeighborhoodAttentionSpec(32, 4), (21, 14)),
    (NeighborhoodAttentionSpec(64, 5), (40, 7)),
    (NeighborhoodAttentionSpec(16, 6), (25, 17)),
    (NeighborhoodAttentionSpec(24, 7), (23, 29)),
    (NeighborhoodAttentionSpec(32, 8), (31, 20)),
    (NeighborhoodAttentionSpec(16, 9), (9, 61)),
    (NeighborhoodAttentionSpec(64, 10), (28, 27)),
    (NeighborhoodAttentionSpec(16, 11), (29, 33)),
    (NeighborhoodAttentionSpec(24, 12), (12, 72)),
    (NeighborhoodAttentionSpec(128, 13), (33, 31)),
    (NeighborhoodAttentionSpec(32, 13), (13, 13)),
]
PLAIN = {"global": "sdpa", "shifted-window": "sdpa", "neighborhood": "tiled"}
# of 16 bits: three units in the last place, for the sums of gradients are rounded, too
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 3 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 3 * torch.finfo(torch.float16).eps,
}


def case_id(value):
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    size = getattr(value, "kernel_size", getattr(value, "window_size", ""))
    return f"{value.name}{size}-{value.d_head}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
@pytest.mark.parametrize(("geometry", "size"), CASES, ids=case_id)
def test_plain_backends_are_the_formula_forward_and_backward(geometry, size, dtype):
    inputs = qkv(*size, e=geometry.d_head, dtype=dtype)
    run = BACKENDS[geometry.name][PLAIN[geometry.name]].run
    assert_same(run, geometry, inputs, TOLERANCE[dtype])


@pytest.mark.parametrize(("geometry", "size"), CASES, ids=case_id)
def test_the_reference_is_the_formula(geometry, size):
    inputs = qkv(*size, e=geometry.d_head)
    assert_same(BACKENDS[geometry.name]["reference"].run, geometry, inputs, 1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=case_id)
@pytest.mark.parametrize("backend", ["plain", "reference"])
@pytest.mark.parametrize(("geometry", "size"), [CASES[1], CASES[7], CASES[16]], ids=case_id)
def test_all_dtypes(geometry, size, backend, dtype):
    inputs = qkv(*size, e=geometry.d_head, dtype=dtype)
    name = PLAIN[geometry.name] if backend == "plain" else backend
    assert_same(BACKENDS[geometry.name][name].run, geometry, inputs, TOLERANCE[dtype])


@pytest.mark.parametrize("k", [3, 6, 7, 13])
def test_rows_of_tiles_are_the_formula(monkeypatch, k):
    monkeypatch.setattr(neighborhood, "_MAX_TOKENS_IN_ONE_PLAN", 0)
    for size in ((13, 13), (27, 19), (40, 14)):
        assert_same(neighborhood.tiled, NeighborhoodAttentionSpec(8, k), qkv(*size), 1e-5)


def test_samples_are_cut_into_parts_without_a_trace(monkeypatch):
    geometry, inputs = NeighborhoodAttentionSpec(8, 3), qkv(17, 17, n=5)
    whole = neighborhood.tiled(*inputs, geometry)
    monkeypatch.setattr(tiles, "_NUMBERS_AT_ONCE", 2 * inputs[0][0].numel())
    torch.testing.assert_close(neighborhood.tiled(*inputs, geometry), whole)
    assert_same(neighborhood.tiled, geometry, inputs, 1e-5)


@pytest.mark.parametrize(("geometry", "size"), [CASES[0], CASES[6], CASES[13], CASES[14]])
def test_views_and_batches_of_none(geometry, size):
    qkv_ = torch.stack(qkv(*size, e=geometry.d_head, grad=False), dim=3)  # as a layer projects them
    views = qkv_.unbind(3)
    assert not views[0].is_contiguous()
    torch.testing.assert_close(attend(geometry, *views), formula(geometry, *views))
    none = [x[:0].requires_grad_() for x in views]
    y = attend(geometry, *none)
    assert y.shape == none[0].shape
    y.sum().backward()


@pytest.mark.parametrize(("geometry", "size"), [CASES[0], CASES[6], CASES[14]])
def test_autocast_takes_attention_to_bf16_and_gives_gradients_of_the_inputs_dtype(geometry, size):
    inputs = qkv(*size, e=geometry.d_head)

    def run(q, k, v, geometry):
        with torch.autocast("cpu", torch.bfloat16):
            y = attend(geometry, q, k, v)
        assert y.dtype == torch.bfloat16
        return y.float()

    assert_same(run, geometry, inputs, 2 * TOLERANCE[torch.bfloat16])  # the inputs are rounded, too


# ---------------------------------------------------------------- FlexAttention's tiles


@pytest.mark.parametrize("k", [1, 4, 7, 13])
@pytest.mark.parametrize("size", [(13, 13), (24, 33), (17, 50), (34, 64), (32, 128)])
def test_flex_lists_the_blocks_that_hold_a_visible_pair(k, size):
    """Sparsity that uncompiled FlexAttention doesn't use, and compiled code relies on."""
    geometry = NeighborhoodAttentionSpec(16, k)
    plan = flex._plan(geometry, *size, torch.device("cpu"))
    blocks, block = plan.sees[0].shape[-1], plan.tile[0] * plan.tile[1]
    in_rows = torch.arange(size[0] * size[1])
    tokens, place = plan.order or (in_rows, in_rows)
    assert tokens[place].equal(in_rows)
    pairs = geometry.mask(*size).nonzero()
    want = torch.zeros(blocks, blocks, dtype=torch.bool)
    want[place[pairs[:, 0]] // block, place[pairs[:, 1]] // block] = True
    for (number, order), seen in ((plan.sees, want), (plan.seen_by, want.mT)):
        assert order.is_contiguous()  # as kernels read it, whatever its strides
        for i in range(blocks):
            assert set(order[0, 0, i].tolist()) == set(range(blocks))
            listed = set(order[0, 0, i, : number[0, 0, i]].tolist())
            assert listed == set(seen[i].nonzero().flatten().tolist())


def test_flex_takes_the_tiles_that_see_the_fewest_others():
    def plan(side, k):
        return flex._plan(NeighborhoodAttentionSpec(16, k), side, side, torch.device("cpu"))

    def seen(plan):
        return plan.sees[0].float().mean().item() * 128

    # keys computed for a query of a kernel of 7, where 8 x 16 tiles make it 640, 880 and 1081
    assert (plan(32, 7).tile, seen(plan(32, 7))) == ((4, 32), 352)
    assert (plan(64, 7).tile, seen(plan(64, 7))) == ((2, 64), 624)
    assert plan(64, 7).order is None  # as wide as the grid: its own order
    assert (plan(256, 7).tile, seen(plan(256, 7))) == ((4, 32), 1045)
    assert plan(64, 13).tile == (8, 16)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("geometry", "size"), CASES[11:], ids=case_id)
def test_flex_is_the_formula(monkeypatch, geometry, size):
    """Its arrangement of tokens and its mask; test_attention_compile.py compiles it."""
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)
    assert_same(flex.flex, geometry, qkv(*size, n=1, e=geometry.d_head, grad=False), 1e-5)


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
    run = BACKENDS[geometry.name][backend].run
    run(*inputs, geometry)  # makes the plan, whose making is not counted
    with LargestTensor() as mode:
        run(*inputs, geometry).sum().backward()
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


def test_plans_are_made_once_for_a_shape_a_device_and_a_dtype():
    geometry, cpu = NeighborhoodAttentionSpec(8, 3), torch.device("cpu")
    plan = neighborhood._plan(geometry, 24, 20, cpu, torch.float32)
    assert neighborhood._plan(geometry, 24, 20, cpu, torch.float32) is plan
    assert neighborhood._plan(geometry, 20, 24, cpu, torch.float32) is not plan
    assert neighborhood._plan(geometry, 24, 20, cpu, torch.bfloat16).mask.dtype == torch.bfloat16
    meta = neighborhood._plan(geometry, 24, 20, torch.device("meta"), torch.float32)
    assert {x.device.type for x in (meta.mask, *meta.index)} == {"meta"}


def test_the_default_device_and_dtype_do_not_reach_a_plan():
    geometry = NeighborhoodAttentionSpec(8, 3)
    inputs = qkv(26, 23)  # a size of this test's own: the plan isn't in the cache yet
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            y = attend(geometry, *inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(y, formula(geometry, *inputs))


@pytest.mark.parametrize(("geometry", "size"), [CASES[6], CASES[14]])
def test_shapes_alone_will_do(geometry, size):
    inputs = [x.detach().to("meta").requires_grad_() for x in qkv(*size, e=geometry.d_head)]
    y = attend(geometry, *inputs)
    y.sum().backward()
    assert y.shape == inputs[0].grad.shape == inputs[0].shape


# ---------------------------------------------------------------- bad input


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(
        ValueError,
        match="kernel_size 7 is larger than the 6 x 9 tokens of this level; use at most 6",
    ):
        attend(NeighborhoodAttentionSpec(8, 7), *qkv(6, 9))
    message = r"window_size 4 does not divide the 6 x 12 tokens .* that do: \[2, 3, 6\]"
    with pytest.raises(ValueError, match=message):
        attend(ShiftedWindowAttentionSpec(8, 4), *qkv(6, 12))
    with pytest.raises(ValueError, match="that do: none but 1"):
        attend(ShiftedWindowAttentionSpec(8, 4), *qkv(5, 12))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_dtypes_that_have_no_attention_are_named(dtype):
    inputs = [torch.zeros(1, 4, 4, 1, 8).to(dtype)] * 3
    with pytest.raises(ValueError, match=rf"float16, bfloat16, float32 or float64, got {dtype}"):
        attend(GlobalAttentionSpec(8), *inputs)


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        (NeighborhoodAttentionSpec(8, 0), "kernel_size must be at least 1, got 0"),
        (ShiftedWindowAttentionSpec(8, 0), "window_size must be at least 1, got 0"),
    ],
)
def test_windows_have_a_size(geometry, message):
    with pytest.raises(ValueError, match=message):
        attend(geometry, *(torch.zeros(1, 4, 4, 1, 8) for _ in range(3)))
