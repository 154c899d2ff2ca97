"""The straightforward form of a training step, to hold the package's against.

What a good engineer writes who takes torch's operations as they are: norms, and the normalisation
and rotation of queries and keys, by their formulas, without steps of autograd of their own; global
and window attention by one call of SDPA in the order of the axes that it takes; AdamW and the
average of the weights over lists of tensors (`foreach`).
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from k_diffusion.models import attention, autograd, image_transformer_v2, transformer

Tensor = torch.Tensor

# ---------------------------------------------------------------- attention


def global_attention(q: Tensor, k: Tensor, v: Tensor, geometry: Any) -> Tensor:
    q_, k_, v_ = (rearrange(x, "n h w heads e -> n heads (h w) e") for x in (q, k, v))
    out = F.scaled_dot_product_attention(q_, k_, v_, scale=1.0)
    return rearrange(out, "n heads (h w) e -> n h w heads e", h=q.shape[1])


@lru_cache
def window_mask(geometry: Any, h: int, w: int, device: torch.device) -> Tensor:
    """Which tokens of a window of the rolled image belong together."""
    size, shift = geometry.window_size, geometry.shift
    # the windows that the tokens at each place of the rolled image belong to
    rows, cols = (geometry.axis_window(side).to(device).roll(-shift) for side in (h, w))
    parts = rearrange(rows[:, None] * w + cols, "(y p) (x q) -> (y x) (p q)", p=size, q=size)
    return parts[:, None, :, None] == parts[:, None, None, :]


def window_attention(q: Tensor, k: Tensor, v: Tensor, geometry: Any) -> Tensor:
    n, h, w, _, _ = q.shape
    size, shift = geometry.window_size, geometry.shift
    mask = window_mask(geometry, h, w, q.device) if shift else None

    def windows(x: Tensor) -> Tensor:
        x = x.roll((-shift, -shift), dims=(1, 2))
        return rearrange(x, "n (y p) (x q) heads e -> (y x) (n heads) (p q) e", p=size, q=size)

    q_, k_, v_ = windows(q), windows(k), windows(v)
    out = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask, scale=1.0)
    shape = {"n": n, "y": h // size, "p": size}
    out = rearrange(out, "(y x) (n heads) (p q) e -> n (y p) (x q) heads e", **shape)
    return out.roll((shift, shift), dims=(1, 2))


@contextmanager
def formulas(*names: str) -> Iterator[None]:
    """Within it, some of the element-wise parts go by their formulas (`rms_norm`,
    `normalize_and_rotate`), operation by operation, in place of their own steps of autograd."""
    with ExitStack() as stack:
        for name in names:
            module = image_transformer_v2 if name == "normalize_and_rotate" else transformer
            formula = getattr(autograd, f"{name}_formula")
            stack.enter_context(mock.patch.object(module, name, formula))
        yield


@contextmanager
def plain(brute_force: bool = False) -> Iterator[None]:
    """Within it, transformers run in the straightforward form, also in their backward pass.

    Neighborhood attention still goes by tiles. brute_force: by an N x N mask over all tokens
    instead.
    """
    backends = {"global": global_attention, "shifted-window": window_attention}
    with ExitStack() as stack:
        stack.enter_context(formulas("rms_norm", "normalize_and_rotate"))
        for geometry, run in backends.items():
            row = {"sdpa": attention.Backend(run)}
            stack.enter_context(mock.patch.dict(attention.BACKENDS[geometry], row))
        if brute_force:
            forced = {attention.ENV_VAR: "neighborhood=reference"}
            stack.enter_context(mock.patch.dict(os.environ, forced))
        yield


# ---------------------------------------------------------------- optimizer and average


def make_optimizer(config: Mapping[str, Any], model: Any) -> torch.optim.Optimizer:
    """AdamW over lists of tensors, of a config's `optimizer` section."""
    o = config["optimizer"]
    if o["type"] != "adamw":
        raise ValueError(f"the straightforward form has an adamw optimizer, got {o['type']}")
    return torch.optim.AdamW(
        model.param_groups(o["lr"]),
        lr=o["lr"],
        betas=tuple(o["betas"]),
        eps=o["eps"],
        weight_decay=o["weight_decay"],
        foreach=True,
    )


@torch.no_grad()
def ema_update(model: nn.Module, averaged: nn.Module, decay: float) -> None:
    """averaged = decay averaged + (1 - decay) model, over lists of tensors."""
    new, old = ([p.detach() for p in net.parameters()] for net in (model, averaged))
    torch._foreach_lerp_(old, new, 1 - decay)
    for buffer, averaged_buffer in zip(model.buffers(), averaged.buffers()):
        averaged_buffer.copy_(buffer)
