"""Choices and plans of attention as constants of compiled code.

Which backend runs and how a grid is cut into tiles follow from the geometry, the size of the grid,
the device and the dtype. `torch.compile` must not trace that work, which reads the environment,
imports packages and fills caches. A function marked by `flags.constant_when_compiled` runs while
torch.compile traces, and its result becomes a constant of the graph; but its arguments have to be
constants too, and an object such as a geometry is none. So a geometry crosses as a tuple of its
fields, its key, and is made again on the other side.
"""

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, wraps
from typing import Any, TypeVar

from .. import flags
from .geometry import (
    Geometry,
    GlobalAttentionSpec,
    NeighborhoodAttentionSpec,
    ShiftedWindowAttentionSpec,
)

R = TypeVar("R")
Key = tuple[Any, ...]

_GEOMETRIES: dict[str, type[Geometry]] = {
    cls.name: cls
    for cls in (GlobalAttentionSpec, NeighborhoodAttentionSpec, ShiftedWindowAttentionSpec)
}
_FIELDS = {name: [f.name for f in dataclasses.fields(cls)] for name, cls in _GEOMETRIES.items()}


def _key(geometry: Geometry) -> Key:
    return geometry.name, *[getattr(geometry, field) for field in _FIELDS[geometry.name]]


@cache
def _geometry(key: Key) -> Geometry:
    return _GEOMETRIES[key[0]](*key[1:])


def constant(function: Callable[..., R]) -> Callable[..., R]:
    """Makes a function (geometry, *args) -> result one whose result compiled code holds.

    args: numbers, devices, dtypes. Sizes must be ints: `operator.index` makes them so.
    """

    def by_key(key: Key, *args: Any) -> R:
        return function(_geometry(key), *args)

    flags.constant_when_compiled(by_key)

    @wraps(function)
    def by_geometry(geometry: Geometry, *args: Any) -> R:
        return by_key(_key(geometry), *args)

    return by_geometry


def cached_plan(make: Callable[..., R]) -> Callable[..., R]:
    """`constant` for a function that makes a plan of tensors, which is kept for the next call.

    A plan is made in a thread of its own, which the caller's inference mode, fake tensors and
    default device don't reach: what they make could not be used in training later.
    """

    @lru_cache(maxsize=64)
    def cached(*args: Any) -> R:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(make, *args).result()

    plan = constant(cached)
    plan.__wrapped__ = make  # type: ignore[attr-defined]
    return plan
