"""Neighborhood attention by the kernels of NATTEN, old and new."""

from functools import lru_cache
from typing import Any

import torch

from .choice import Request, custom_kernel, installed
from .geometry import NeighborhoodAttentionSpec


@lru_cache
def version() -> tuple[int, ...] | None:
    """NATTEN's (major, minor), or None."""
    if not installed("natten"):
        return None
    from importlib.metadata import version

    return tuple(int(part) for part in version("natten").split("+")[0].split(".")[:2])


def _version_within(low: tuple[int, int], high: tuple[int, int] | None) -> str | None:
    found = version()
    if found is None:
        return 'natten is not installed (pip install "k-diffusion[natten]")'
    if found < low or (high is not None and found >= high):
        wanted = f"{'.'.join(map(str, low))}" + (f" to {high[0]}.{high[1] - 1}" if high else "")
        return f"needs natten {'' if high else '>= '}{wanted}, got {'.'.join(map(str, found))}"
    return None


def _head_of_eights(request: Request) -> str | None:
    d = request.geometry.d_head
    return f"needs d_head to be a multiple of 8, got {d}" if d % 8 else None


def _odd_kernel(request: Request) -> str | None:
    k = request.geometry.kernel_size  # type: ignore[union-attr]
    return f"needs an odd kernel_size above 1, got {k}" if k < 3 or k % 2 == 0 else None


def not_without_kernels(request: Request) -> str | None:
    """On the CPU NATTEN has slow forms alone."""
    return None if request.device == "cuda" else f"not chosen by itself on {request.device}"


def why_not_natten(request: Request) -> str | None:
    if request.geometry.kernel_size < 2:  # type: ignore[union-attr]
        return "needs kernel_size >= 2"
    if request.device == "cpu" and request.needs_grad:
        return "has no backward on the CPU"
    if request.forward_mode:
        return "has no forward-mode derivatives"
    return _version_within((0, 20), None) or _head_of_eights(request)


def natten(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, geometry: NeighborhoodAttentionSpec
) -> torch.Tensor:
    """NATTEN >= 0.20's `na2d`, heads last (arXiv 2504.16922)."""
    from natten import na2d

    return na2d(q, k, v, kernel_size=geometry.kernel_size, scale=1.0)


why_not_natten_0_17 = custom_kernel(
    _odd_kernel, lambda request: _version_within((0, 17), (0, 20)), _head_of_eights
)


def natten_0_17(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, geometry: NeighborhoodAttentionSpec
) -> torch.Tensor:
    """The fused kernel of NATTEN 0.17 to 0.19 (arXiv 2403.04690), heads last."""
    from natten.functional import na2d

    return na2d(q, k, v, kernel_size=geometry.kernel_size, scale=1.0)


def why_not_unfused(request: Request) -> str | None:
    if request.device not in ("cpu", "cuda"):
        return f"needs a CPU or CUDA device, got {request.device}"
    if request.forward_mode:
        return "is not used for forward-mode derivatives"
    return _odd_kernel(request) or _version_within((0, 14), (0, 20))


def unfused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, geometry: NeighborhoodAttentionSpec
) -> torch.Tensor:
    """NATTEN's two products with a softmax between, of (n, heads, h, w, kernel_size ** 2) scores.

    Versions before 0.17 have the same functions under older names.
    """
    from natten import functional

    old: Any = hasattr(functional, "natten2dqk")
    scores_of = functional.natten2dqk if old else functional.na2d_qk
    sum_of = functional.natten2dav if old else functional.na2d_av
    q, k, v = (x.movedim(-2, 1) for x in (q, k, v))
    scores = scores_of(q, k, geometry.kernel_size, 1)
    return sum_of(scores.softmax(dim=-1), v, geometry.kernel_size, 1).movedim(1, -2)
