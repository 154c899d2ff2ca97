"""Tensors: types wide enough to compute in, dimensions, sizes, and copies."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch

# By the names of command lines.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """What numbers of some types are squared and summed in: at least float32."""
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def widen(x: torch.Tensor) -> torch.Tensor:
    """x in at least float32: squares of noise levels above 255 don't fit into float16, and sums of
    half precision lose too much.

    x: (...), any shape.
    """
    return x.to(wide(x.dtype))


def append_dims(x: torch.Tensor, target_dims: int) -> torch.Tensor:
    """x with dimensions of size 1 appended until it has target_dims.

    x: (...), of at most target_dims dimensions. Raises ValueError where x has more than that.
    """
    if x.ndim > target_dims:
        raise ValueError(f"x has {x.ndim} dimensions, more than the {target_dims} asked for")
    return x.reshape(*x.shape, *(1,) * (target_dims - x.ndim))


def recordable(x: Any) -> Any:
    """A tensor made under inference_mode can't take part in a gradient; its copy can."""
    return x.clone() if isinstance(x, torch.Tensor) and x.is_inference() else x


def in_float64(x: torch.Tensor) -> torch.Tensor:
    """x in float64; on the CPU where its device has no such numbers.

    x: (...), any shape.
    """
    return (x.cpu() if x.device.type == "mps" else x).double()


def nbytes(state: Any) -> int:
    """The bytes that the tensors in a nest of dicts, lists and tuples take."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    if isinstance(state, dict):
        state = state.values()
    elif not isinstance(state, list | tuple):
        return 0
    return sum(map(nbytes, state))


def map_tensors(function: Callable[[torch.Tensor], Any], state: Any) -> Any:
    """A nest of dicts, lists, tuples and plain values with a function of each of its tensors."""
    return map_named_tensors(lambda name, x: function(x), state)


def map_named_tensors(
    function: Callable[[str, torch.Tensor], Any], state: Any, name: str = ""
) -> Any:
    """As `map_tensors`, for a function of each tensor's name, `key/key/...`, and the tensor."""
    if isinstance(state, torch.Tensor):
        return function(name, state)
    inner = f"{name}/" if name else ""
    if isinstance(state, dict):
        copied = copy.copy(state)  # of its kind, with the versions that a state dict carries
        copied.update(
            (key, map_named_tensors(function, x, f"{inner}{key}")) for key, x in state.items()
        )
        return copied
    if isinstance(state, list | tuple):
        named = enumerate(state)
        return type(state)(map_named_tensors(function, x, f"{inner}{i}") for i, x in named)
    return state


def copy_to_host(state: Any) -> Any:
    """A copy on the CPU of a nest of dicts, lists, tuples, tensors and plain values."""
    return map_tensors(lambda x: x.detach().to("cpu", copy=True), state)
