"""Element-wise parts of the transformers, each as one function of autograd with its own backward.

They read and write memory less often than their formulas, which are beside them, and keep less for
the backward pass. Compiled code, transforms of torch.func, forward-mode and second derivatives take
the formulas.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from ..common.tensors import wide
from .rope import rotate

Tensor = torch.Tensor


def needs_plain_ops() -> bool:
    """Whether torch must see each operation: in compiled code, under transforms of torch.func, and
    where forward-mode derivatives are taken."""
    return (
        torch.compiler.is_compiling()
        # not by the tensors: under a nested transform they don't show their tangents
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


def backward_needs_plain_ops(grad: Tensor) -> bool:
    """Whether torch must see each operation of a backward pass: one to be differentiated itself
    (create_graph), or one for a batch of gradients (is_grads_batched). grad: (...)."""
    return torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad)


def differentiate(
    formula: Callable[..., Tensor], inputs: Sequence[Any], grad: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of a formula with respect to its inputs, None where not needed.

    grad: (...), the shape of the formula's output.
    """
    again = torch.is_grad_enabled()
    wanted = [x for x, need in zip(inputs, needed) if need]
    with torch.enable_grad():
        out = formula(*inputs)
    grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=again))
    return tuple(next(grads) if need else None for need in needed)


# ---------------------------------------------------------------- RMS normalisation


def rms_norm_formula(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x / rms(x) * scale over the last axis. x: (..., d). scale: broadcasts to (..., d)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x.dtype, scale.dtype))
    return (x * torch.rsqrt(norm.square() / x.shape[-1] + eps) * scale).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        dtype = wide(x.dtype, scale.dtype)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, rstd)
        ctx.eps = eps
        return (x * rstd).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, scale, rstd = ctx.saved_tensors
        if backward_needs_plain_ops(grad):
            inputs = (x, scale, ctx.eps)
            return differentiate(rms_norm_formula, inputs, grad, ctx.needs_input_grad)
        # one row of scales for each group of tokens
        rows = scale.view(-1, 1, x.shape[-1]).to(rstd.dtype)
        by_group = rstd.view(len(rows), -1, 1)
        grad, wide_x = grad.to(rstd.dtype), x.to(rstd.dtype)
        with torch.autocast(x.device.type, enabled=False):
            product = (grad * wide_x).reshape(len(rows), -1, x.shape[-1])
            grad_scale = (by_group.mT @ product).view_as(scale).to(scale.dtype)
            along = (product @ rows.mT) * by_group.pow(3) / -x.shape[-1]
        grad_x = torch.mul(grad, scale, out=product.view_as(x)).mul_(rstd)
        grad_x.addcmul_(wide_x, along.view_as(rstd))
        return grad_x.to(x.dtype), grad_scale, None


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x / rms(x) * scale over the last axis; the mean square is taken in at least float32.

    x: (..., d). scale: broadcasts to (..., d). Returns the dtype of x.
    """
    d = x.shape[-1]
    a_row = scale.numel() == d == scale.shape[-1]
    a_row_a_sample = scale.ndim == x.ndim and scale.numel() == len(x) * d == len(scale) * d
    if needs_plain_ops() or not (x.is_contiguous() and x.numel() and (a_row or a_row_a_sample)):
        return rms_norm_formula(x, scale, eps)
    return _RMSNorm.apply(x, scale, eps)


# ---------------------------------------------------------------- queries and keys


def normalize(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Scales vectors to length sqrt(scale). x: (..., n_heads, d_head), scale: (n_heads,)."""
    dtype = wide(x.dtype, scale.dtype)
    sum_sq = x.to(dtype).square().sum(dim=-1, keepdim=True)
    return x * (scale.to(dtype).sqrt()[:, None] * torch.rsqrt(sum_sq + eps)).to(x.dtype)


def normalize_and_rotate_formula(
    x: Tensor, scale: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    """`normalize`, then `rotate`.

    x: (..., n_heads, d_head). scale: (n_heads,). cos, sin: broadcast to (..., n_heads, d), with 2 d
    at most d_head.
    """
    return torch.cat(rotate(normalize(x, scale, eps), cos, sin), dim=-1)


def _rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b, _ = x.split([cos.shape[-1], cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    a_sin = a * sin
    a.mul_(cos).addcmul_(b, sin, value=-1)
    b.mul_(cos).add_(a_sin)
    return x


class _NormalizeAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        dtype = wide(x.dtype, scale.dtype)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        rnorm = norm.square_().add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, cos, sin, rnorm)
        ctx.eps = eps
        return _rotate_(x * (rnorm * scale.to(dtype).sqrt()[:, None]), cos, sin).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, scale, cos, sin, rnorm = ctx.saved_tensors
        if backward_needs_plain_ops(grad):
            inputs = (x, scale, cos, sin, ctx.eps)
            return differentiate(normalize_and_rotate_formula, inputs, grad, ctx.needs_input_grad)
        root = scale.to(rnorm.dtype).sqrt()
        wide_x = x.to(rnorm.dtype)
        grad = grad.to(rnorm.dtype, copy=True, memory_format=torch.contiguous_format)
        grad = _rotate_(grad, cos, -sin)
        along = (grad * wide_x).sum(dim=-1, keepdim=True).mul_(rnorm)
        grad_root = along.flatten(0, -3).sum(dim=0).flatten()
        length = rnorm * root[:, None]
        grad_x = grad.mul_(length).addcmul_(wide_x, along.mul_(rnorm).mul_(length), value=-1)
        return grad_x.to(x.dtype), (grad_root / (2 * root)).to(scale.dtype), None, None, None


def normalize_and_rotate(x: Tensor, scale: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Queries or keys for cosine-similarity attention: of length sqrt(scale), rotated by RoPE.

    x: (n, h, w, n_heads, d_head). scale: (n_heads,). cos, sin: (h, w, n_heads, up to d_head / 2),
    as `rope.cos_sin` makes them. The dot product of two is `scale` times the cosine of their angle.
    """
    if needs_plain_ops() or cos.requires_grad or sin.requires_grad:
        return normalize_and_rotate_formula(x, scale, cos, sin, eps)
    return _NormalizeAndRotate.apply(x, scale, cos, sin, eps)
