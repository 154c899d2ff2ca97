"""Checks of what a model's forward is called with."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from .autograd import needs_plain_ops


def check_shape(
    name: str,
    value: torch.Tensor | None,
    shape: Sequence[int | str],
    wanted: object = True,
    optional: bool = False,
) -> None:
    """Hold an input of a model against its shape, in which a word stands for any size.

    value: (...), to be checked. wanted: false if the model has no such input. optional: whether it
    may be None. Raises ValueError with the expected and the given shape.
    """
    if value is None:
        if wanted and not optional:
            raise ValueError(f"this model needs {name} of shape {_text(shape)}; got None")
    elif not wanted:
        raise ValueError(f"this model takes no {name}, got one of shape {tuple(value.shape)}")
    elif value.ndim != len(shape) or any(
        not isinstance(size, str) and size != given for size, given in zip(shape, value.shape)
    ):
        raise ValueError(f"{name} of shape {_text(shape)} expected, got {tuple(value.shape)}")


def check_floats(**values: torch.Tensor) -> None:
    """Raise ValueError unless the named tensors hold real floating point numbers."""
    for name, value in values.items():
        if not value.is_floating_point():
            raise ValueError(
                f"{name} must hold floating point numbers, got {value.dtype}; convert it with "
                ".float()"
            )


def check_type(name: str, x: torch.Tensor, layer: nn.Module) -> None:
    """Raise ValueError if x isn't of the type of a layer's weights, unless something converts it:
    autocast, or a layer from elsewhere in this one's place.

    x: (...), any shape.
    """
    ours = type(layer).__module__.partition(".")[0] == __name__.partition(".")[0]
    dtype = cast(torch.Tensor, layer.weight).dtype
    if ours and x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"{name} is of {x.dtype}, but the model of {dtype}; convert one of them with .to(), or "
            "run the model under torch.autocast"
        )


def check_classes(class_cond: torch.Tensor | None, num_classes: int) -> None:
    """Raise ValueError unless class ids are integers from 0 to num_classes - 1.

    Their range is only looked at where it makes nothing wait: on the CPU, outside of compiled code.

    class_cond: (n,).
    """
    if class_cond is None:
        return
    if class_cond.is_floating_point() or class_cond.dtype == torch.bool:
        raise ValueError(f"class_cond must hold integers, got {class_cond.dtype}")
    # a fake tensor, of another type, has no numbers
    if class_cond.device.type != "cpu" or type(class_cond) is not torch.Tensor or needs_plain_ops():
        return
    if len(class_cond) == 0:
        return
    low, high = class_cond.aminmax()
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"class_cond must lie between 0 and {num_classes - 1}, the last row of the table of "
            f"class embeddings; got {int(low)} to {int(high)}"
        )


def _text(shape: Sequence[int | str]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def check_multiple(h: int, w: int, multiple: Sequence[int], reason: str) -> None:
    """Raise ValueError unless h and w are multiples of multiple[0] and multiple[1].

    The message gives the reason and the next larger valid size.
    """
    rest = h % multiple[0], w % multiple[1]
    if any(rest):
        valid = [s + m - r if r else s for s, m, r in zip((h, w), multiple, rest)]
        raise ValueError(
            f"height and width must be multiples of {multiple[0]} and {multiple[1]} ({reason}), "
            f"got {h} x {w}; the next larger valid size is {valid[0]} x {valid[1]}"
        )
