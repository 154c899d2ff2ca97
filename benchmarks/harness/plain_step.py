"""The straightforward form of a training step, to hold the package's against.

The same arithmetic, each part the way that its formula is written down: norms, GEGLU, the
normalisation and rotation of queries and of keys as operations one after the other, windows and
masks built at each call, the optimizer and the average parameter by parameter.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from k_diffusion.models import attention, autograd, image_transformer_v2, transformer
from k_diffusion.models.attention import neighborhood

Tensor = torch.Tensor

# ---------------------------------------------------------------- layers


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    wide = at_least_float32(x)
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return (wide * torch.rsqrt(mean_square + eps) * scale).to(x.dtype)


def normalize(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    wide = at_least_float32(x)
    length = torch.sqrt(wide.square().sum(dim=-1, keepdim=True) + eps)
    return (wide / length * torch.sqrt(at_least_float32(scale))[:, None]).to(x.dtype)


def rotate(x: Tensor, theta: Tensor) -> Tensor:
    cos, sin, d = theta.cos(), theta.sin(), theta.shape[-1]
    a, b, rest = x[..., :d], x[..., d : 2 * d], x[..., 2 * d :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x.dtype)


def angles(theta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """In place of their cosines and sines, which queries and keys then take each for itself."""
    return theta, theta


def normalize_and_rotate(x: Tensor, scale: Tensor, theta: Tensor, _: Tensor, eps: float) -> Tensor:
    return rotate(normalize(x, scale, eps), theta)


# ---------------------------------------------------------------- attention


def global_attention(q: Tensor, k: Tensor, v: Tensor, geometry: Any) -> Tensor:
    q_, k_, v_ = (rearrange(x, "n h w heads e -> n heads (h w) e") for x in (q, k, v))
    out = F.scaled_dot_product_attention(q_, k_, v_, scale=1.0)
    return rearrange(out, "n heads (h w) e -> n h w heads e", h=q.shape[1])


def window_attention(q: Tensor, k: Tensor, v: Tensor, geometry: Any) -> Tensor:
    n, h, w, _, _ = q.shape
    size, shift = geometry.window_size, geometry.shift
    mask = None
    if shift:
        # the windows that the tokens at each place of the rolled image belong to
        rows, cols = (geometry.axis_window(side).to(q.device).roll(-shift) for side in (h, w))
        parts = rearrange(rows[:, None] * w + cols, "(y p) (x q) -> (y x) (p q)", p=size, q=size)
        mask = parts[:, None, :, None] == parts[:, None, None, :]

    def windows(x: Tensor) -> Tensor:
        x = x.roll((-shift, -shift), dims=(1, 2))
        return rearrange(x, "n (y p) (x q) heads e -> (y x) (n heads) (p q) e", p=size, q=size)

    q_, k_, v_ = windows(q), windows(k), windows(v)
    out = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask, scale=1.0)
    shape = {"n": n, "y": h // size, "p": size}
    out = rearrange(out, "(y x) (n heads) (p q) e -> n (y p) (x q) heads e", **shape)
    return out.roll((shift, shift), dims=(1, 2))


@contextmanager
def plain(brute_force: bool = False) -> Iterator[None]:
    """Within it, transformers run in the straightforward form, also in their backward pass.

    Neighborhood attention still goes by tiles, but plans them at each call. brute_force: by an
    N x N mask over all tokens instead.
    """
    cached = {name: f for name, f in vars(neighborhood).items() if hasattr(f, "__wrapped__")}
    replaced = [
        (transformer, {"rms_norm": rms_norm, "normalize": normalize}),
        (image_transformer_v2, {"cos_sin": angles, "normalize_and_rotate": normalize_and_rotate}),
        (neighborhood, {name: plan.__wrapped__ for name, plan in cached.items()}),
    ]
    backends = {"global": global_attention, "shifted-window": window_attention}
    with ExitStack() as stack:
        for module, functions in replaced:
            stack.enter_context(mock.patch.multiple(module, **functions))
        for geometry, run in backends.items():
            row = {"sdpa": attention.Backend(run)}
            stack.enter_context(mock.patch.dict(attention.BACKENDS[geometry], row))
        if brute_force:
            forced = {attention.ENV_VAR: "neighborhood=reference"}
            stack.enter_context(mock.patch.dict(os.environ, forced))
        yield


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


# ---------------------------------------------------------------- optimizer and average


def make_optimizer(config: Mapping[str, Any], model: Any) -> torch.optim.Optimizer:
    """AdamW that goes from parameter to parameter, of a config's `optimizer` section."""
    o = config["optimizer"]
    if o["type"] != "adamw":
        raise ValueError(f"the straightforward form has an adamw optimizer, got {o['type']}")
    return torch.optim.AdamW(
        model.param_groups(o["lr"]),
        lr=o["lr"],
        betas=tuple(o["betas"]),
        eps=o["eps"],
        weight_decay=o["weight_decay"],
        foreach=False,
        fused=False,
    )


@torch.no_grad()
def ema_update(model: nn.Module, averaged: nn.Module, decay: float) -> None:
    """averaged = decay averaged + (1 - decay) model, parameter by parameter."""
    for new, old in zip(model.parameters(), averaged.parameters()):
        old.mul_(decay).add_(new, alpha=1 - decay)
    for buffer, averaged_buffer in zip(model.buffers(), averaged.buffers()):
        averaged_buffer.copy_(buffer)
