"""Global attention by the FlashAttention packages."""

import importlib
from collections.abc import Callable, Container
from functools import lru_cache
from typing import Any

import torch

from .. import flags
from .choice import Request, custom_kernel, half_precision, why_not_imported
from .geometry import Geometry


def _head_of_at_most(limit: int) -> Callable[[Request], str | None]:
    def need(request: Request) -> str | None:
        d = request.geometry.d_head
        if d % 8 or d > limit:
            return f"needs d_head to be a multiple of 8, at most {limit}, got {d}"
        return None

    return need


def _package(module: str, hint: str) -> Callable[[Request], str | None]:
    def need(request: Request) -> str | None:
        if reason := why_not_imported(module, hint):
            return reason
        # FlashAttention-4 alone leaves a package of version 2's name that holds nothing
        if not hasattr(importlib.import_module(module), "flash_attn_func"):
            return f"{module} is not installed ({hint})"
        return None

    return need


@lru_cache
def _capability() -> int:
    return torch.cuda.get_device_capability()[0]


def _architecture(what: str, majors: Container[int]) -> Callable[[Request], str | None]:
    return lambda request: None if _capability() in majors else f"needs {what}"


def _not_turned_off(request: Request) -> str | None:
    return None if flags.get_use_flash_attention_2() else "turned off by K_DIFFUSION_USE_FLASH_2"


why_not_flash2 = custom_kernel(
    _not_turned_off,
    half_precision,
    _head_of_at_most(256),
    _architecture("an Ampere GPU or a later one", range(8, 100)),
    _package("flash_attn", "pip install flash-attn --no-build-isolation"),
)
why_not_flash3 = custom_kernel(
    half_precision,
    _head_of_at_most(256),
    _architecture("a Hopper GPU", (9,)),
    _package("flash_attn_interface", "the hopper folder of flash-attention's repository"),
)
why_not_flash4 = custom_kernel(
    half_precision,
    _head_of_at_most(128),
    _architecture("a Hopper or Blackwell GPU", (9, 10)),
    _package("flash_attn.cute", "pip install flash-attn-4"),
)


def _run(
    function: Callable[..., Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    out = function(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), softmax_scale=1.0)
    out = out[0] if isinstance(out, tuple) else out  # some versions add the log-sum-exp
    return out.reshape(q.shape)


def flash2(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """FlashAttention-2 (arXiv 2307.08691)."""
    from flash_attn import flash_attn_func

    return _run(flash_attn_func, q, k, v)


def flash3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """FlashAttention-3 (arXiv 2407.08608)."""
    from flash_attn_interface import flash_attn_func

    return _run(flash_attn_func, q, k, v)


def flash4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """FlashAttention-4, the package's kernels in CuTe DSL."""
    from flash_attn.cute import flash_attn_func

    return _run(flash_attn_func, q, k, v)
