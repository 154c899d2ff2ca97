"""Make what a config describes: the inner model, its denoiser, its noise-level density.

The sections of a config build themselves; here is how a plain dict becomes one.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .base import ConfigError
from .load import parse


def make_model(config: Mapping[str, Any]) -> nn.Module:
    """The inner model, (x, sigma, **cond) -> F, of a config; weights at their initial values."""
    typed = parse(config, lenient=True)
    if typed.dataset.num_classes is None:
        raise ConfigError(
            "dataset.num_classes: the subfolders that a training run counts aren't read here; "
            "pass --set dataset.num_classes=N"
        )
    return typed.model.build(typed.dataset.num_classes)


def make_denoiser_wrapper(config: Mapping[str, Any]) -> Callable[[nn.Module], nn.Module]:
    """A function that wraps the inner model into the Karras denoiser of a config."""
    return parse(config, lenient=True).model.build_wrapper()


def make_sample_density(config: Mapping[str, Any]) -> Callable[..., torch.Tensor]:
    """The training density of noise levels: a function of (shape, device=, dtype=).

    config: the `model` section of a config.
    """
    model = parse({"model": config}, lenient=True).model
    return model.sigma_sample_density.build(model)
