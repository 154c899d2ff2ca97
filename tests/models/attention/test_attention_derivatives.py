"""Derivatives of the plain attention backends, of both orders and modes, and what they leave."""

import pytest
import torch
from attention_oracle import formula, qkv
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from k_diffusion.models import attention
from k_diffusion.models.attention import (
    BACKENDS,
    GlobalAttentionSpec,
    NeighborhoodAttentionSpec,
    ShiftedWindowAttentionSpec,
    attend,
    neighborhood,
    tiles,
)


@pytest.fixture(autouse=True)
def no_backend_forced(monkeypatch):
    monkeypatch.delenv(attention.ENV_VAR, raising=False)


# of a neighborhood: one dense tile, and tiles of which the last overlaps the one before
CASES = {
    "global": (GlobalAttentionSpec(2), (3, 2)),
    "neighborhood-dense": (NeighborhoodAttentionSpec(2, 3), (4, 5)),
    "neighborhood-tiles": (NeighborhoodAttentionSpec(2, 3), (17, 18)),
    "windows": (ShiftedWindowAttentionSpec(2, 2), (4, 2)),
    "windows-shifted": (ShiftedWindowAttentionSpec(2, 4, shift=2), (8, 4)),
}
by_case = pytest.mark.parametrize(("geometry", "size"), CASES.values(), ids=CASES)


def exact(size, n=1, heads=2):
    return qkv(*size, n=n, heads=heads, e=2, dtype=torch.float64)


def plain(x):
    return [t.detach() for t in x]


def directions(inputs):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=g, dtype=x.dtype) for x in inputs]


def loss_of(run, geometry):
    return lambda *inputs: run(geometry, *inputs).sin().square().sum()


def assert_close(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


# ---------------------------------------------------------------- by differences


@by_case
def test_first_and_second_derivatives_by_differences(geometry, size):
    def run(q, k, v):
        return attend(geometry, q, k, v)

    inputs = exact(size, heads=1)
    check = {"check_forward_ad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(run, inputs, **check)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_derivatives_of_rows_of_tiles_by_differences(monkeypatch):
    monkeypatch.setattr(neighborhood, "_MAX_TOKENS_IN_ONE_PLAN", 0)
    monkeypatch.setattr(tiles, "_NUMBERS_AT_ONCE", 0)

    def run(q, k, v):
        return attend(NeighborhoodAttentionSpec(2, 4), q, k, v)

    inputs = exact((11, 10), n=2, heads=1)
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


# ---------------------------------------------------------------- against the formula


@by_case
def test_forward_mode(geometry, size):
    inputs = plain(exact(size))
    tangents = directions(inputs)
    want = torch.func.jvp(lambda *x: formula(geometry, *x), tuple(inputs), tuple(tangents))
    got = torch.func.jvp(lambda *x: attend(geometry, *x), tuple(inputs), tuple(tangents))
    assert_close(got, want)
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents)]
        assert_close(forward_ad.unpack_dual(attend(geometry, *dual)), want)
    # and it is over: the kernel is back
    assert attend(geometry, *exact(size)).grad_fn is not None
    assert_close([attend(geometry, *inputs)], want[:1])


@by_case
def test_double_backward(geometry, size):
    found = []
    for run in (formula, attend):
        inputs = exact(size)
        first = torch.autograd.grad(loss_of(run, geometry)(*inputs), inputs, create_graph=True)
        total = sum((g * d).sum() for g, d in zip(first, directions(inputs)))
        found.append([*first, *torch.autograd.grad(total, inputs)])
    assert_close(found[1], found[0])


@by_case
def test_a_third_derivative(geometry, size):
    found = []
    for run in (formula, attend):
        inputs, value = exact(size, heads=1), None
        value = loss_of(run, geometry)(*inputs)
        for _ in range(3):
            grads = torch.autograd.grad(value, inputs, create_graph=True)
            value = sum((g * d).sum() for g, d in zip(grads, directions(inputs)))
        found.append(grads)
    assert_close(found[1], found[0])


@by_case
def test_products_with_the_hessian_in_both_orders(geometry, size):
    inputs = plain(exact(size))
    tangents = tuple(directions(inputs))
    argnums = (0, 1, 2)

    def forward_over_reverse(loss):
        return torch.func.jvp(torch.func.grad(loss, argnums), tuple(inputs), tangents)[1]

    def reverse_over_forward(loss):
        def slope(*inputs):
            return torch.func.jvp(loss, inputs, tangents)[1]

        return torch.func.grad(slope, argnums)(*inputs)

    want = forward_over_reverse(loss_of(formula, geometry))
    for product in (forward_over_reverse, reverse_over_forward):
        assert_close(product(loss_of(attend, geometry)), want)


@by_case
def test_functional_gradients(geometry, size):
    inputs = plain(exact(size))
    for argnums in ((0, 1, 2), (1,)):
        want = torch.func.grad(loss_of(formula, geometry), argnums)(*inputs)
        assert_close(torch.func.grad(loss_of(attend, geometry), argnums)(*inputs), want)
    out, vjp = torch.func.vjp(lambda *x: attend(geometry, *x), *inputs)
    want = torch.func.vjp(lambda *x: formula(geometry, *x), *inputs)[1](out)
    assert_close(vjp(out), want)


@by_case
def test_vmap_and_gradients_of_each_sample(geometry, size):
    inputs = plain(exact(size, n=3))
    want = formula(geometry, *inputs)

    def one(q, k, v):
        return attend(geometry, q[None], k[None], v[None])[0]

    assert_close([torch.vmap(one)(*inputs)], [want])
    grads = torch.func.grad(lambda *x: one(*x).sin().sum(), (0, 1, 2))
    want = torch.func.grad(lambda *x: formula(geometry, *x).sin().sum(), (0, 1, 2))(*inputs)
    assert_close(torch.vmap(grads)(*inputs), want)


def test_hessian():
    geometry, size = CASES["windows"]
    q, k, v = plain(exact(size, heads=1))

    def loss(run):
        return lambda q: run(geometry, q, k, v).sin().sum()

    want = torch.func.hessian(loss(formula))(q)
    jacobian = torch.func.jacrev(lambda q: attend(geometry, q, k, v))(q)
    assert_close([jacobian], [torch.func.jacfwd(lambda q: formula(geometry, q, k, v))(q)])
    assert_close([torch.func.hessian(loss(attend))(q)], [want])
    for vectorize in (False, True):
        got = torch.autograd.functional.hessian(loss(attend), q, vectorize=vectorize)
        assert_close([got], [want])


@by_case
def test_inputs_of_one_origin(geometry, size):
    """q, k and v may be one tensor, or functions of each other."""
    (x, _, _) = exact(size)
    for make in (lambda x: (x, x, x), lambda x: (x, x.sin(), x.cos()), lambda x: (x.exp(), x, x)):
        results = []
        for run in (formula, attend):
            value = loss_of(run, geometry)(*make(x))
            grad = torch.autograd.grad(value, x, create_graph=True)[0]
            results.append([grad, torch.autograd.grad(grad.square().sum(), x)[0]])
        assert_close(results[1], results[0])


@by_case
def test_gradients_of_some_inputs_alone(geometry, size):
    for index in range(3):
        results = []
        for run in (formula, attend):
            inputs = plain(exact(size))
            x = inputs[index].requires_grad_()
            grad = torch.autograd.grad(loss_of(run, geometry)(*inputs), x, create_graph=True)[0]
            results.append([grad, torch.autograd.grad(grad.square().sum(), x)[0]])
        assert_close(results[1], results[0])


# ---------------------------------------------------------------- with training's other parts


@by_case
def test_recomputation_changes_no_derivative(geometry, size):
    results = []
    for recompute in (False, True):
        q, k, v = exact(size)

        def run(q, k, v):
            return attend(geometry, q * 2, k, v).sin()

        out = checkpoint(run, q, k, v, use_reentrant=False) if recompute else run(q, k, v)
        grads = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
        results.append([*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k))])
    assert_close(results[1], results[0])


@by_case
def test_a_second_derivative_through_autocast(geometry, size):
    def gradients(context):
        inputs = [x.detach().float().requires_grad_() for x in exact(size)]
        with context:
            out = attend(geometry, *inputs)
        first = torch.autograd.grad(out.float().sin().sum(), inputs, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)]

    narrow = gradients(torch.autocast("cpu", torch.bfloat16))
    for a, b in zip(narrow, gradients(torch.autocast("cpu", enabled=False))):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=0.1 * max(1, b.abs().max().item()))


def backward_of_the_kernel(geometry, inputs):
    """Whether the kernel's backward pass ran, without create_graph, and the gradients."""
    out = attend(geometry, *inputs)
    (kernel,) = (x for x in walk(out.grad_fn) if "ScaledDotProduct" in type(x).__name__)
    calls = []
    kernel.register_hook(lambda _, grads: calls.extend(x for x in grads if x is not None))
    gradients = torch.autograd.grad(out.sin().sum(), inputs)
    return bool(calls), gradients


def test_the_backward_pass_of_training_is_the_kernels():
    """No scores of all pairs are made anew."""
    assert backward_of_the_kernel(GlobalAttentionSpec(8), qkv(6, 6))[0]


@pytest.mark.parametrize(
    ("dtype", "side", "amx", "kernels"),
    [
        (torch.bfloat16, 8, True, False),
        (torch.bfloat16, 16, True, True),  # 256 keys
        (torch.bfloat16, 8, False, True),
        (torch.float32, 8, True, True),
    ],
)
def test_where_amx_multiplies_the_backward_pass_of_windows_is_by_products(
    dtype, side, amx, kernels, monkeypatch
):
    monkeypatch.setattr(attention.plain, "has_amx", lambda dtype: amx)
    inputs = qkv(side, side, dtype=dtype)
    geometry = ShiftedWindowAttentionSpec(8, side)
    ran, got = backward_of_the_kernel(geometry, inputs)
    assert ran == kernels
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = torch.autograd.grad(formula(geometry, *exact).sin().sum(), exact)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=0.02 * b.abs().max().item())


def walk(node):
    yield node
    for child, _ in node.next_functions:
        if child is not None:
            yield from walk(child)


# ---------------------------------------------------------------- what a first use leaves


def fill_in_inference_mode(geometry, inputs):
    with torch.inference_mode():
        attend(geometry, *inputs)


def fill_in_a_transform(geometry, inputs):
    torch.func.grad(lambda q: attend(geometry, q, *inputs[1:]).sum())(inputs[0])


def fill_in_vmap(geometry, inputs):
    torch.vmap(lambda q: attend(geometry, q, *inputs[1:]))(torch.stack([inputs[0]] * 2))


def fill_in_forward_mode(geometry, inputs):
    torch.func.jvp(lambda q: attend(geometry, q, *inputs[1:]), inputs[:1], inputs[:1])


def fill_with_fake_tensors(geometry, inputs):
    with FakeTensorMode(allow_non_fake_inputs=True):
        attend(geometry, *inputs)


FIRST_USES = [
    fill_in_inference_mode,
    fill_in_a_transform,
    fill_in_vmap,
    fill_in_forward_mode,
    fill_with_fake_tensors,
]


@pytest.mark.parametrize("fill", FIRST_USES, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "geometry",
    [NeighborhoodAttentionSpec(2, 3), ShiftedWindowAttentionSpec(2, 4, shift=2)],
    ids=lambda g: g.name,
)
def test_a_plan_serves_training_wherever_it_was_made(geometry, fill):
    size = (28, 4 * (9 + FIRST_USES.index(fill)))  # of this test's own: not in the cache yet
    inputs = exact(size)
    fill(geometry, tuple(plain(inputs)))
    for run in (attend, lambda g, *x: BACKENDS[g.name]["reference"].run(*x, g)):
        out = run(geometry, *inputs)
        assert_close([out], [formula(geometry, *inputs)])
        first = torch.autograd.grad(out.sin().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        assert all(x.isfinite().all() for x in second)
        assert not any(x.is_inference() for x in (out, *first, *second))
