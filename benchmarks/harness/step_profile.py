"""Where the time of a training step goes, by what it is spent on, from torch's profiler.

The parts are marked from here, around the package's functions, whichever form they are in. Time of
the backward pass belongs to the part whose forward pass it follows.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from k_diffusion.models import image_transformer_v1, image_transformer_v2, transformer

from . import bench

PREFIX = "part: "
PRODUCTS = "matrix products"
OPTIMIZER = f"{PREFIX}clipping, optimizer, average"
OTHER = "other: residuals, dropout, token merging, loss"

# function of a module: the part that it belongs to
PARTS: list[tuple[Any, str, str]] = [
    (transformer, "rms_norm", "norms"),
    (transformer, "geglu", "GEGLU, without its products"),
    (transformer, "normalize", "q and k: cosine scaling, RoPE"),
    (image_transformer_v2, "cos_sin", "q and k: cosine scaling, RoPE"),
    (image_transformer_v2, "normalize_and_rotate", "q and k: cosine scaling, RoPE"),
    (image_transformer_v1, "apply_rotary_emb", "q and k: cosine scaling, RoPE"),
    (image_transformer_v2, "grid_attention", "attention"),
    (image_transformer_v1, "grid_attention", "attention"),
]
_PRODUCT_OPS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::mkldnn_linear"}
_BACKWARD = "autograd::engine::evaluate_function"

COLUMNS: bench.Columns = {
    "part": ("part", str),
    "eager": ("eager, ms", bench.digits),
    "straightforward": ("straightforward, ms", bench.digits),
    "share": ("of the eager step", bench.percent),
}


@contextmanager
def marked(within: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """A context in which the parts are marked, as that context puts them."""

    def mark(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with record_function(PREFIX + part):
                return function(*args, **kwargs)

        return run

    with ExitStack() as stack:
        stack.enter_context(within())
        for module, name, part in PARTS:
            function = mark(getattr(module, name), part)
            stack.enter_context(mock.patch.object(module, name, function))
        yield


def _ancestors(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _part(event: Any, forward: dict[int, Any]) -> str:
    """What an event's own time was spent on. forward: the event that made each node of autograd."""
    for e in _ancestors(event):
        if e.name.startswith(PREFIX):
            return e.name.removeprefix(PREFIX)
        if e.name.startswith(_BACKWARD) and e.sequence_nr in forward:
            part = _part(forward[e.sequence_nr], {})
            if part not in (PRODUCTS, OTHER):
                return part
            break
    is_product = any(e.name in _PRODUCT_OPS for e in _ancestors(event))
    return PRODUCTS if is_product else OTHER


def by_class(step: bench.Run, device: torch.device, number: int = 3) -> dict[str, float]:
    """The share of each part in the time of steps that mark them, the largest first."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    step()
    with profile(activities=activities) as profiler:
        for _ in range(number):
            step()
        bench.clock(device)
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CPU]
    forward = {}
    for e in sorted(events, key=lambda e: e.time_range.start):
        backward = any(a.name.startswith(_BACKWARD) for a in _ancestors(e))
        if e.sequence_nr >= 0 and not backward:
            forward[e.sequence_nr] = e  # the innermost one makes the node
    parts: dict[str, float] = {}
    for e in events:
        spent = e.self_device_time_total if device.type == "cuda" else e.self_cpu_time_total
        if spent:
            part = _part(e, forward)
            parts[part] = parts.get(part, 0) + spent
    total = sum(parts.values())
    return {k: v / total for k, v in sorted(parts.items(), key=lambda item: -item[1])}
