"""Tensors: types wide enough to compute in, dimensions, and copies that gradients can pass."""

import functools
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
    return x[(...,) + (None,) * (target_dims - x.ndim)]


def recordable(x: Any) -> Any:
    """A tensor made under inference_mode can't take part in a gradient; its copy can."""
    return x.clone() if isinstance(x, torch.Tensor) and x.is_inference() else x


def in_float64(x: torch.Tensor) -> torch.Tensor:
    """x in float64; on the CPU where its device has no such numbers.

    x: (...), any shape.
    """
    return (x.cpu() if x.device.type == "mps" else x).double()
