"""Which backend computes a geometry: by what is installed, the device, the dtype and the shape."""

import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import torch

from ...common.text import unknown_name
from .. import flags
from .constants import constant
from .geometry import Geometry, GlobalAttentionSpec

logger = logging.getLogger(__name__)

ENV_VAR = "K_DIFFUSION_ATTENTION"
# In the environment: whatever is best here, also where the config forces a backend.
AUTO = "auto"

Run: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any], torch.Tensor]


@dataclass(frozen=True)
class Request:
    """What attention is asked for.

    h, w: the grid of tokens. device: its type. needs_grad: whether a backward pass may follow.
    transformed: whether a transform of torch.func (grad, vmap, jvp) is at work, or forward-mode
    derivatives are taken.
    """

    geometry: Geometry
    h: int
    w: int
    device: str
    dtype: torch.dtype
    needs_grad: bool = True
    transformed: bool = False


def can_always(request: Request) -> str | None:
    """The predicate of plain PyTorch: nothing stands against it."""
    return None


@dataclass(frozen=True)
class Backend:
    """One way to run a geometry.

    run: (q, k, v, geometry) -> output, all of (n, h, w, heads, d_head).
    why_not: a reason why it can't do what is requested, or None.
    passed_over: a reason not to choose it without being asked for, or None.
    plain: whether it is made of torch's own operations, which run on tensors without numbers, too.
    """

    run: Run
    why_not: Callable[[Request], str | None] = can_always
    passed_over: Callable[[Request], str | None] = can_always
    plain: bool = False


# By geometry, the best first; filled by the package's __init__.
BACKENDS: dict[str, dict[str, Backend]] = {}


@lru_cache
def why_not_imported(module: str, hint: str) -> str | None:
    """Imports a module; if that fails, the reason, with a hint where it isn't installed."""
    try:
        importlib.import_module(module)
    except Exception as error:  # kernels that were built for another torch fail in any way
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            return f"{module} is not installed ({hint})"
        return f"{module} can't be imported: {(str(error) or repr(error)).splitlines()[0]}"
    return None


def not_transformed(request: Request) -> str | None:
    """The predicate of kernels that torch can't look into."""
    return "has no transforms of torch.func and no forward mode" if request.transformed else None


def custom_kernel(*needs: Callable[[Request], str | None]) -> Callable[[Request], str | None]:
    """The predicate of CUDA kernels from other packages: the first reason that any need gives."""

    def why_not(request: Request) -> str | None:
        if request.device != "cuda":
            return f"needs a CUDA device, got {request.device}"
        needs_too = (need(request) for need in (not_transformed, *needs))
        return next(filter(None, needs_too), None)

    return why_not


def half_precision(request: Request) -> str | None:
    if request.dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16, got {str(request.dtype).removeprefix('torch.')}"
    return None


def forced_backends(setting: str) -> dict[str, str]:
    """Parse a `geometry=backend,...` setting. Raises ValueError, listing what there is."""
    forced = {}
    for item in filter(None, (part.strip() for part in setting.split(","))):
        geometry, _, name = (part.strip() for part in item.partition("="))
        if name not in (*BACKENDS.get(geometry, ()), AUTO) or geometry not in BACKENDS:
            rows = "; ".join(f"{g}={'|'.join(rows)}|{AUTO}" for g, rows in BACKENDS.items())
            raise ValueError(f"{ENV_VAR}: no backend {item!r}; there are {rows}")
        forced[geometry] = name
    return forced


def reasons(request: Request) -> dict[str, str | None]:
    """For each backend of the request's geometry, why it can't run here, or None."""
    return {name: row.why_not(request) for name, row in BACKENDS[request.geometry.name].items()}


@lru_cache(maxsize=1024)
def _choose(request: Request, setting: str, use_flash_2: bool) -> str:
    # use_flash_2, which a predicate reads, is a part of the cache's key
    geometry = request.geometry
    rows = BACKENDS[geometry.name]
    who, forced = ENV_VAR, forced_backends(setting).get(geometry.name)
    if forced is None and geometry.backend is not None:
        who, forced = "the config", geometry.backend
        if forced not in rows:
            raise unknown_name(f"{geometry.name} attention backend", forced, rows)
    why_not = reasons(request)
    can = [name for name, reason in why_not.items() if reason is None]
    if forced in rows and forced not in can:
        text = f"{who} asks for {geometry.name}={forced}, which can't run here: {why_not[forced]}"
        if who != ENV_VAR:
            text += f"; {ENV_VAR}={geometry.name}={AUTO} overrides it"
        raise ValueError(f"{text}; these can: {', '.join(can)}")
    why_not = {name: why_not[name] or rows[name].passed_over(request) for name in rows}
    chosen = forced if forced in rows else next(n for n in rows if why_not[n] is None)
    logger.debug(
        "%s at %d x %d on %s %s%s: backend %s%s%s",
        geometry,
        request.h,
        request.w,
        request.device,
        str(request.dtype).removeprefix("torch."),
        " with gradients" if request.needs_grad else "",
        chosen,
        f" (forced by {who})" if chosen == forced else "",
        "".join(f"; {n}: {reason}" for n, reason in why_not.items() if reason and n != chosen),
    )
    return chosen


def choose_backend(request: Request) -> str:
    """The name of the backend for a request; logs at DEBUG why.

    Raises ValueError if the environment or the config forces one that can't run here.
    """
    setting = os.environ.get(ENV_VAR, "")
    return _choose(request, setting, flags.get_use_flash_attention_2())


_plain_only: ContextVar[bool] = ContextVar("k_diffusion_plain_attention_only", default=False)


@contextmanager
def plain_only() -> Iterator[None]:
    """Within it, torch's fused attention stands in for backends that aren't plain.

    For estimates with tensors that have no numbers, which other packages' kernels can't take. It
    keeps for the backward pass what such kernels do: q, k, v, the output, and a number per query
    and head. The setting belongs to the thread (or task) that enters it.
    """
    token = _plain_only.set(True)
    try:
        yield
    finally:
        _plain_only.reset(token)


@constant
def row_to_run(geometry: Geometry, *request: Any) -> tuple[str, str]:
    """The geometry and the name of the row of BACKENDS that `attend` runs.

    request: the fields of a Request after the geometry, in order.
    """
    name = choose_backend(Request(geometry, *request))
    if _plain_only.get() and not BACKENDS[geometry.name][name].plain:
        return GlobalAttentionSpec.name, "sdpa"
    return geometry.name, name
