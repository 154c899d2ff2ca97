"""Optimizers, learning-rate schedules and the EMA's decay, from their sections of a config."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..common.text import need
from .ema import EMAWarmup
from .lr_schedules import (
    ConstantLRWithWarmup,
    CosineLR,
    ExponentialLR,
    InverseLR,
    InverseSqrtLR,
)
from .muon import MuonWithAdamW, hidden_matrices

Groups = list[dict[str, Any]]


def _adamw(
    groups: Groups, o: Mapping[str, Any], fused: bool, model: nn.Module
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        groups,
        lr=o["lr"],
        betas=tuple(o["betas"]),
        eps=o["eps"],
        weight_decay=o["weight_decay"],
        fused=fused,
    )


def _adam8bit(
    groups: Groups, o: Mapping[str, Any], fused: bool, model: nn.Module
) -> torch.optim.Optimizer:
    # Adam, whose weight decay is part of the gradient, unlike adamw's
    adam = need("bitsandbytes", "optimizer adam8bit", "bitsandbytes").optim.Adam8bit
    return adam(
        groups, lr=o["lr"], betas=tuple(o["betas"]), eps=o["eps"], weight_decay=o["weight_decay"]
    )


def _sgd(
    groups: Groups, o: Mapping[str, Any], fused: bool, model: nn.Module
) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        groups,
        lr=o["lr"],
        momentum=o["momentum"],
        nesterov=o["nesterov"],
        weight_decay=o["weight_decay"],
        fused=fused,
    )


def _muon(
    groups: Groups, o: Mapping[str, Any], fused: bool, model: nn.Module
) -> torch.optim.Optimizer:
    return MuonWithAdamW(
        groups,
        hidden_matrices(model),
        lr=o["lr"],
        weight_decay=o["weight_decay"],
        momentum=o["momentum"],
        nesterov=o["nesterov"],
        betas=tuple(o["betas"]),
        eps=o["eps"],
    )


OPTIMIZERS: dict[
    str, Callable[[Groups, Mapping[str, Any], bool, nn.Module], torch.optim.Optimizer]
] = {
    "adamw": _adamw,
    "adam8bit": _adam8bit,
    "sgd": _sgd,
    "muon": _muon,
}

LR_SCHEDS: dict[str, Callable[..., torch.optim.lr_scheduler.LRScheduler]] = {
    "constant": ConstantLRWithWarmup,
    "inverse": InverseLR,
    "exponential": ExponentialLR,
    "cosine": CosineLR,
    "inverse-sqrt": InverseSqrtLR,
}


def make_optimizer(
    config: Mapping[str, Any], model: Any, fused: bool = True
) -> torch.optim.Optimizer:
    """The optimizer of a config over a model's `param_groups`.

    fused: update all parameters in one kernel. Not under a GradScaler: it would then skip steps
    without saying so.
    """
    section = config["optimizer"]
    groups = model.param_groups(section["lr"])
    return OPTIMIZERS[section["type"]](groups, section, fused, model)


def make_lr_sched(
    config: Mapping[str, Any], opt: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning-rate schedule of a config, to be stepped once per optimizer step."""
    section = dict(config["lr_sched"])
    return LR_SCHEDS[section.pop("type")](opt, **section)


def make_ema_sched(config: Mapping[str, Any]) -> EMAWarmup:
    """The warm-up of the averaged weights' decay of a config."""
    section = dict(config["ema_sched"])
    section.pop("type")
    return EMAWarmup(**section)
