"""Neighborhood attention by the kernels of NATTEN, old and new."""

import re
from functools import lru_cache
from importlib import metadata
from typing import Any

import torch

from .choice import Request, custom_kernel, not_transformed, why_not_imported
from .geometry import NeighborhoodAttentionSpec

_HINT = 'pip install "k-diffusion[natten]"'
# On an H100 a training step's attention takes its fused kernels 5.8 times as long as the tiled form
# at 256 tokens and 2.7 times as long as FlexAttention at 1,024; from 4,096 on they are about even.
_MIN_TOKENS = 2048


@lru_cache
def version() -> tuple[int, ...] | None:
    """NATTEN's (major, minor), or None where it isn't installed."""
    try:
        found = metadata.version("natten")
    except metadata.PackageNotFoundError:
        return None
    return tuple(int(number) for number in re.findall(r"\d+", found)[:2])


def _version_within(
    request: Request, low: tuple[int, int], high: tuple[int, int] | None
) -> str | None:
    found = version()
    if found is None:
        return f"natten is not installed ({_HINT})"
    if found < low or (high is not None and found >= high):
        wanted = f"{'.'.join(map(str, low))}" + (f" to {high[0]}.{high[1] - 1}" if high else "")
        return f"needs natten {'' if high else '>= '}{wanted}, got {'.'.join(map(str, found))}"
    # its libraries take seconds to load: not where it won't be chosen by itself
    return why_not_imported("natten", _HINT) if request.device == "cuda" else None


def _head_of_eights(request: Request) -> str | None:
    d = request.geometry.d_head
    return f"needs d_head to be a multiple of 8, got {d}" if d % 8 else None


def _odd_kernel(request: Request) -> str | None:
    k = request.geometry.kernel_size  # type: ignore[union-attr]
    return f"needs an odd kernel_size above 1, got {k}" if k < 3 or k % 2 == 0 else None


def _single_precision(request: Request) -> str | None:
    if request.dtype == torch.float64:
        return "needs float32, float16 or bfloat16, got float64"
    return None


def _runs_on(request: Request) -> str | None:
    if request.device not in ("cpu", "cuda"):
        return f"needs a CPU or CUDA device, got {request.device}"
    return None


def not_for_small_grids(request: Request) -> str | None:
    """On few tokens other backends are faster, and so is any without its CUDA kernels."""
    if reason := not_without_kernels(request):
        return reason
    if request.h * request.w < _MIN_TOKENS:
        return f"not chosen by itself below {_MIN_TOKENS} tokens"
    return None


def not_without_kernels(request: Request) -> str | None:
    """Without its CUDA kernels, which its plain wheel lacks, NATTEN has slow forms alone."""
    if request.device != "cuda":
        return f"not chosen by itself on {request.device}"
    import natten

    if not getattr(natten, "HAS_LIBNATTEN", True):
        return "not chosen by itself: this natten was built without its CUDA kernels, libnatten"
    return None


def why_not_natten(request: Request) -> str | None:
    if request.geometry.kernel_size < 2:  # type: ignore[union-attr]
        return "needs kernel_size >= 2"
    reason = (
        not_transformed(request)
        or _runs_on(request)
        or _single_precision(request)
        or _head_of_eights(request)
        or _version_within(request, (0, 20), None)
    )
    if reason is None and request.device == "cpu" and request.needs_grad:
        return "has no backward on the CPU"
    return reason


def natten(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, geometry: NeighborhoodAttentionSpec
) -> torch.Tensor:
    """NATTEN >= 0.20's `na2d`, heads last (arXiv 2504.16922)."""
    from natten import na2d

    return na2d(q, k, v, kernel_size=geometry.kernel_size, scale=1.0)


why_not_natten_0_17 = custom_kernel(
    _odd_kernel,
    _single_precision,
    _head_of_eights,
    lambda request: _version_within(request, (0, 17), (0, 20)),
)


def natten_0_17(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, geometry: NeighborhoodAttentionSpec
) -> torch.Tensor:
    """The fused kernel of NATTEN 0.17 to 0.19 (arXiv 2403.04690), heads last."""
    from natten.functional import na2d

    return na2d(q, k, v, kernel_size=geometry.kernel_size, scale=1.0)


def why_not_unfused(request: Request) -> str | None:
    return (
        not_transformed(request)
        or _runs_on(request)
        or _odd_kernel(request)
        or _version_within(request, (0, 14), (0, 20))
    )


def unfused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, geometry: NeighborhoodAttentionSpec
) -> torch.Tensor:
    """NATTEN's two products with a softmax between, of (n, heads, h, w, kernel_size ** 2) scores.

    Versions before 0.17 have the same functions under older names.
    """
    from natten import functional

    new: Any = hasattr(functional, "na2d_qk")  # where both are, the old ones warn at every call
    scores_of = functional.na2d_qk if new else functional.natten2dqk
    sum_of = functional.na2d_av if new else functional.natten2dav
    q, k, v = (x.movedim(-2, 1) for x in (q, k, v))
    scores = scores_of(q, k, geometry.kernel_size, 1)
    return sum_of(scores.softmax(dim=-1), v, geometry.kernel_size, 1).movedim(1, -2)
