"""Global attention: FlashAttention-2 and torch's scaled_dot_product_attention; the reference."""

import importlib.util
from functools import lru_cache

import torch

from .. import flags
from .geometry import Geometry
from .tiles import dense_attention


def can_always(geometry: Geometry, device: str, dtype: torch.dtype, needs_grad: bool) -> str | None:
    """The predicate of plain PyTorch: nothing stands against it."""
    return None


@lru_cache
def _has_flash2() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def why_not_flash2(
    geometry: Geometry, device: str, dtype: torch.dtype, needs_grad: bool
) -> str | None:
    if not flags.get_use_flash_attention_2():
        return "turned off by K_DIFFUSION_USE_FLASH_2"
    if device != "cuda":
        return f"needs a CUDA device, got {device}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16, got {dtype}"
    if geometry.d_head > 256:
        return f"needs d_head <= 256, got {geometry.d_head}"
    if not _has_flash2():
        return 'flash-attn is not installed (pip install "k-diffusion[flash]")'
    return None


def flash2(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """FlashAttention-2 (arXiv 2307.08691)."""
    from flash_attn import flash_attn_func

    tokens = [x.flatten(1, 2) for x in (q, k, v)]
    return flash_attn_func(*tokens, softmax_scale=1.0).view_as(q)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """torch's scaled_dot_product_attention, which picks its own kernel."""
    q_, k_, v_ = (x.flatten(1, 2) for x in (q, k, v))
    return dense_attention(q_, k_, v_).reshape(q.shape)


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, geometry: Geometry
) -> torch.Tensor:
    """Softmax over all keys, those outside of the geometry masked out: any geometry, O(N^2)."""
    mask = geometry.mask(q.shape[1], q.shape[2]).to(q.device)
    q_, k_, v_ = (x.flatten(1, 2) for x in (q, k, v))
    scores = torch.einsum("nqhe,nkhe->nhqk", q_, k_).masked_fill(~mask, -torch.inf)
    return torch.einsum("nhqk,nkhe->nqhe", scores.softmax(dim=-1), v_).reshape(q.shape)
