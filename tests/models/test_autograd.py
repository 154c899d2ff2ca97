"""Element-wise parts as single steps: the same values and derivatives as their formulas."""

import pytest
import torch
from torch.func import grad, jvp, vmap

from k_diffusion.models import autograd
from k_diffusion.models.rope import cos_sin


def normal(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=dtype)


def angles(h, w, heads, d, dtype):
    return cos_sin(normal(h, w, heads, d, seed=9), dtype)


# name: (fast, formula, makes the differentiable inputs, the other inputs)
def cases(dtype):
    cos, sin = angles(3, 5, 2, 3, dtype)
    return {
        "rms a row": (
            autograd.rms_norm,
            autograd.rms_norm_formula,
            (normal(2, 3, 5, 8, dtype=dtype), normal(8, seed=1, dtype=dtype)),
            (1e-3,),
        ),
        "rms a row a sample": (
            autograd.rms_norm,
            autograd.rms_norm_formula,
            (normal(2, 3, 5, 8, dtype=dtype), normal(2, 1, 1, 8, seed=1, dtype=dtype)),
            (1e-3,),
        ),
        "queries": (
            autograd.normalize_and_rotate,
            autograd.normalize_and_rotate_formula,
            # a view, as out of a projection to q, k and v
            (normal(2, 3, 5, 3, 2, 8, dtype=dtype)[..., 1, :, :], normal(2, dtype=dtype).exp()),
            (cos, sin, 1e-3),
        ),
    }


NAMES = list(cases(torch.float64))


@pytest.fixture(params=NAMES)
def case(request):
    fast, formula, inputs, rest = cases(torch.float64)[request.param]
    inputs = tuple(x.requires_grad_() for x in inputs)
    return (lambda *a: fast(*a, *rest)), (lambda *a: formula(*a, *rest)), inputs


def test_values_and_first_and_second_derivatives(case):
    fast, formula, inputs = case
    torch.testing.assert_close(fast(*inputs), formula(*inputs))
    assert type(fast(*inputs).grad_fn).__name__ != type(formula(*inputs).grad_fn).__name__
    assert torch.autograd.gradcheck(fast, inputs)
    assert torch.autograd.gradgradcheck(fast, inputs)


def test_gradients_do_not_depend_on_what_lies_in_memory_how(case):
    fast, formula, inputs = case
    out = formula(*inputs)
    weights = normal(*out.shape[::-1], seed=5).permute(*reversed(range(out.ndim)))
    want = torch.autograd.grad(out, inputs, weights)
    got = torch.autograd.grad(fast(*inputs), inputs, weights)
    expanded = torch.autograd.grad(fast(*inputs).sum(), inputs)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(expanded, torch.autograd.grad(formula(*inputs).sum(), inputs))


def test_a_gradient_of_one_input_alone(case):
    fast, formula, inputs = case
    for i in range(len(inputs)):
        some = [x if i == j else x.detach() for j, x in enumerate(inputs)]
        for create_graph in (False, True):
            got, want = (
                torch.autograd.grad(f(*some).square().sum(), some[i], create_graph=create_graph)
                for f in (fast, formula)
            )
            torch.testing.assert_close(got, want)


def test_a_batch_of_gradients_at_once(case):
    fast, formula, inputs = case
    out = fast(*inputs)
    weights = normal(3, *out.shape, seed=7)
    got = torch.autograd.grad(out, inputs, weights, is_grads_batched=True)
    want = torch.autograd.grad(formula(*inputs), inputs, weights, is_grads_batched=True)
    torch.testing.assert_close(got, want)


def test_inputs_and_incoming_gradients_are_left_alone(case):
    fast, _, inputs = case
    before = [x.detach().clone() for x in inputs]
    out = fast(*inputs)
    incoming = torch.ones_like(out)
    torch.autograd.grad(out, inputs, incoming)
    assert incoming.eq(1).all()
    assert all(torch.equal(x, y) for x, y in zip(inputs, before))


def test_transforms_of_torch_func(case):
    fast, formula, inputs = case
    plain = tuple(x.detach() for x in inputs)
    tangents = tuple(normal(*x.shape, seed=3) for x in plain)
    torch.testing.assert_close(jvp(fast, plain, tangents), jvp(formula, plain, tangents))
    hessian_times = [
        jvp(grad(lambda *a, f=f: f(*a).square().sum()), plain, tangents) for f in (fast, formula)
    ]
    torch.testing.assert_close(*hessian_times)
    twice = tuple(torch.stack([x, x * 2]) for x in plain)
    torch.testing.assert_close(vmap(fast)(*twice)[1], formula(*(x * 2 for x in plain)))


def test_compiled_code_sees_the_formula(case):
    fast, formula, inputs = case
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    torch.testing.assert_close(got, torch.autograd.grad(formula(*inputs).square().sum(), inputs))


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_rounded_once(name):
    fast, _, inputs, rest = cases(torch.bfloat16)[name]
    exact, _, wide, wide_rest = cases(torch.float64)[name]
    # the numbers of the exact case are those of the rounded one
    wide = [x.double().requires_grad_() for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    want, got = exact(*wide, *wide_rest), fast(*inputs, *rest)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-7, atol=2**-7)
    for a, b in zip(torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(want.sum(), wide)):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=0.03, atol=0.03 * b.abs().max().item())


def test_float32_scales_of_bfloat16_activations():
    x = normal(2, 3, 4, 8, dtype=torch.bfloat16).requires_grad_()
    scale = normal(8, seed=1, dtype=torch.float32).requires_grad_()
    y = autograd.rms_norm(x, scale, 1e-6)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, scale.grad.dtype) == (torch.bfloat16, x.dtype, scale.dtype)


def test_other_shapes_of_scales_go_by_the_formula():
    x, scale = normal(2, 3, 4, 8), normal(4, 8, seed=1).requires_grad_()
    y = autograd.rms_norm(x, scale, 1e-6)
    torch.testing.assert_close(y, autograd.rms_norm_formula(x, scale, 1e-6))
    assert "RMSNorm" not in type(y.grad_fn).__name__


def test_a_backward_pass_within_autocast_keeps_its_precision():
    x, scale = normal(2, 64, 8, dtype=torch.float32), normal(2, 1, 8, dtype=torch.float32)
    scale.requires_grad_()
    want = torch.autograd.grad(autograd.rms_norm(x, scale, 1e-6).square().sum(), scale)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(autograd.rms_norm(x, scale, 1e-6).square().sum(), scale)
    torch.testing.assert_close(got, want)


def test_less_is_kept_for_the_backward_pass():
    def kept(function, *inputs):
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = function(*inputs)
        del out
        return sum(storages.values())

    for name in NAMES:
        fast, formula, inputs, rest = cases(torch.float64)[name]
        inputs = [x.clone().requires_grad_() for x in inputs]
        assert kept(fast, *inputs, *rest) <= kept(formula, *inputs, *rest)
