"""The memory of a training step's activations and its multiply-accumulates, without running it.

A step runs on fake tensors, which have shapes and no numbers, so that it takes neither memory nor
arithmetic, and the bytes of all tensors alive are added up as operations make them.
"""

import dataclasses
import math
import weakref
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ... import augmentation, conditions, models
from ...config import make_denoiser_wrapper, make_model, make_sample_density
from ...models import attention, flops
from ...models.flags import CHECKPOINTING
from ..step import batch_loss

# On the CPU attention in tiles goes through a batch part by part, which takes time here too: where
# a batch has more tokens, so many are measured and scaled up.
_MOST_TOKENS = 2**15


class _Alive(TorchDispatchMode):
    """Adds up the bytes of the tensors on a device from when operations meet them until they go.

    now: bytes alive. most: the largest they were at once.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device.type
        self.now = self.most = 0
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace != "prim":  # which asks for a tensor's device, say
            self.meet((*args, *kwargs.values(), out))
        return out

    def meet(self, values: Iterable[Any]) -> None:
        """Count the tensors among values, and in lists of them, that are new."""
        for x in values:
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if id(storage) not in self._storages:
                    self._count(storage, storage.nbytes() if x.device.type == self.device else 0)
            elif isinstance(x, tuple | list):
                self.meet(x)

    def _count(self, storage: torch.UntypedStorage, size: int) -> None:
        key = id(storage)  # the same object for as long as the memory is alive

        def free(_: Any) -> None:
            self.now -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, free)
        self.now += size
        self.most = max(self.most, self.now)


class _Autocast(nn.Module):
    """A model as Accelerate prepares it for mixed precision."""

    def __init__(self, inner: nn.Module, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.module, self.device, self.dtype = inner, device.type, dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device, self.dtype):
            out = self.module(*args, **kwargs)
        # the U-Net may return its variance, too
        return out.float() if isinstance(out, torch.Tensor) else tuple(x.float() for x in out)


@dataclass(frozen=True)
class Step:
    """What one batch of a training step takes.

    macs: multiply-accumulates of the forward pass. kept: bytes held from the forward for the
    backward pass, the batch included. most: the most held at any moment, but for the weights and
    the gradients of those that are done.
    """

    macs: int
    kept: int
    most: int


def measure_step(
    config: Mapping[str, Any],
    inner: nn.Module,
    n: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
    checkpointing: str = "off",
) -> Step:
    """A forward and a backward pass of n images. inner: the model, of fake or real tensors."""
    network = inner if autocast is None else _Autocast(inner, device, autocast)
    denoiser = make_denoiser_wrapper(config)(network)
    density = make_sample_density(config["model"])
    batch = {
        "image": torch.zeros(n, config["model"]["input_channels"], *config["model"]["input_size"]),
        "aug_cond": torch.zeros(n, augmentation.COND_DIM),
        "class": torch.zeros(n, dtype=torch.long),
        **conditions.blank(config, n),
    }

    def drop_gradient(p: torch.Tensor) -> None:
        p.grad = None

    with ExitStack() as stack:
        for p in inner.parameters():
            stack.callback(p.register_post_accumulate_grad_hook(drop_gradient).remove)
        alive = stack.enter_context(_Alive(device))
        alive.meet(inner.state_dict().values())
        weights = alive.now
        stack.enter_context(models.checkpointing(**CHECKPOINTING[checkpointing]))
        with flops.flop_counter() as counter:
            loss = batch_loss(denoiser, batch, density, dict(config), device).mean()
        kept = alive.now
        loss.backward()
    return Step(counter.flops, kept - weights, alive.most - weights)


def estimate_steps(
    config: Mapping[str, Any],
    device: torch.device,
    autocast: torch.dtype | None = None,
    batch_size: int = 64,
    tokens: int = 1,
) -> dict[str, Step]:
    """A batch of a training step on a device, for each way of checkpointing.

    autocast: the dtype of mixed precision. tokens: of an image, on the finest level.
    """
    n = batch_size
    if device.type == "cpu":
        n = min(n, max(2, _MOST_TOKENS // tokens))
    with FakeTensorMode(allow_non_fake_inputs=True), attention.plain_only():
        with device:
            inner = make_model(config)
        steps = {
            mode: measure_step(config, inner, n, device, autocast, mode) for mode in CHECKPOINTING
        }
    return {
        mode: Step(*(math.ceil(x * batch_size / n) for x in dataclasses.astuple(step)))
        for mode, step in steps.items()
    }
