"""Counts of multiply-accumulate operations, by shape, as a model runs (meta tensors included).

"flops" is the published name; the numbers are multiply-accumulates (MACs), half of the floating
point operations.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

Shape = Sequence[int]


class FlopCounter:
    """Collects the operations of the forward passes run within `flop_counter()`."""

    def __init__(self) -> None:
        self.ops: list[tuple[Callable[..., int], tuple[Any, ...], dict[str, Any]]] = []

    def op(self, op: Callable[..., int], *args: Any, **kwargs: Any) -> None:
        """Record one operation: a counting function and the shapes that it counts."""
        self.ops.append((op, args, kwargs))

    @property
    def flops(self) -> int:
        """Multiply-accumulates recorded so far."""
        return sum(op(*args, **kwargs) for op, args, kwargs in self.ops)


_counter: ContextVar[FlopCounter | None] = ContextVar("k_diffusion_flop_counter", default=None)


@contextmanager
def flop_counter(enable: bool = True) -> Iterator[FlopCounter]:
    """Within it, operations are recorded in the FlopCounter it yields (in this thread alone)."""
    counter = FlopCounter()
    token = _counter.set(counter if enable else None)
    try:
        yield counter
    finally:
        _counter.reset(token)


def op(op: Callable[..., int], *args: Any, **kwargs: Any) -> None:
    """Record an operation if a counter is active. Compiled code isn't counted."""
    if not torch.compiler.is_compiling() and (counter := _counter.get()) is not None:
        counter.op(op, *args, **kwargs)


def op_linear(x: Shape, weight: Shape) -> int:
    """x: (..., in_features), weight: (out_features, in_features)."""
    return math.prod(x[:-1]) * math.prod(weight)


def op_attention(q: Shape, k: Shape, v: Shape) -> int:
    """q: (..., queries, d), k: (..., keys, d), v: (..., keys, d_v)."""
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def op_natten(q: Shape, k: Shape, v: Shape, kernel_size: int) -> int:
    """Neighborhood attention: every query, (..., d), meets kernel_size ** 2 keys."""
    return math.prod(q[:-1]) * kernel_size**2 * (q[-1] + v[-1])
