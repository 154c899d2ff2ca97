"""Attention in plain PyTorch: every query against every key, and the reference of all geometries.

All of it can be differentiated twice and in forward mode.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from ..autograd import backward_needs_plain_ops, differentiate, needs_plain_ops
from .geometry import Geometry


def formula(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """softmax(q k^T + mask) v. q, k, v: (..., tokens, e); mask: broadcasts
    to (..., queries, keys), 0 where seen and -inf where not."""
    scores = q @ k.mT
    return (scores if mask is None else scores + mask).softmax(dim=-1) @ v


# Of so many keys and more, the kernel's backward pass is the faster one in any dtype.
_FEW_KEYS = 256


def kernel_backward_is_slow(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether products of matrices are the faster backward pass: for windows and tiles in half
    precision on a CPU with AMX, whose instructions the kernel's backward pass doesn't use.
    q, k: (n, heads, tokens, e)."""
    return (
        q.device.type == "cpu"
        and q.dtype in (torch.bfloat16, torch.float16)
        and k.shape[-2] < _FEW_KEYS
        and has_amx(q.dtype)
    )


@cache
def has_amx(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies tiles of a dtype, bfloat16 or float16, in hardware."""
    name = "_is_amx_tile_supported" if dtype == torch.bfloat16 else "_is_amx_fp16_supported"
    return bool(getattr(torch.cpu, name, lambda: False)())  # torch names them no other way


class _OtherBackward(torch.autograd.Function):
    """Gives the output of a fused kernel, which has a first derivative alone, a second one.

    A backward pass that is to be differentiated itself (create_graph) goes by the formula, and
    so does one that the formula is faster at; any other passes through to the kernel's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.by_formula = kernel_backward_is_slow(q, k)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        if not (ctx.by_formula or backward_needs_plain_ops(grad)):
            return grad, None, None, None, None
        needed = ctx.needs_input_grad[1:]
        return None, *differentiate(formula, ctx.saved_tensors, grad, needed)


def fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """The formula by torch's scaled_dot_product_attention, which picks its own kernel.

    q, k, v: (n, heads, tokens, e). mask: broadcasts to (n, heads, queries, keys).
    """
    compiled = torch.compiler.is_compiling()
    if needs_plain_ops() and not compiled:
        return formula(q, k, v, mask)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    if compiled or not out.requires_grad:
        return out
    return _OtherBackward.apply(out, q, k, v, mask)


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Every query against every key. q, k, v: (n, tokens, heads, e). mask: broadcasts
    to (n, heads, queries, keys). Returns the shape of q."""
    return fused(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Global attention by torch's scaled_dot_product_attention."""
    return dense(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)).reshape(q.shape)


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, geometry: Geometry
) -> torch.Tensor:
    """The formula over all keys, those outside of the geometry masked out: any one, O(N^2)."""
    seen = geometry.mask(q.shape[1], q.shape[2]).to(q.device)
    mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, -torch.inf)
    q_, k_, v_ = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    return formula(q_, k_, v_, mask).transpose(1, 2).reshape(q.shape)
