"""Make what a config describes: the inner model, its denoiser, its noise-level density.

The sections of a config build themselves; here is how a plain dict becomes one.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from pydantic import TypeAdapter
from pydantic_core import PydanticCustomError
from torch import nn

from ..common import memory
from .base import ConfigError
from .denoiser_schema import DenoiserSection
from .density_schema import Density, SampleDensity, with_bounds
from .load import parse
from .model_schema import KLAutoencoderModel, Model


def make_model(config: Mapping[str, Any]) -> nn.Module:
    """The inner model, (x, sigma, **cond) -> F, of a config; weights at their initial values."""
    typed = parse(config)
    if typed.dataset.num_classes is None:
        raise ConfigError(
            "dataset.num_classes: the subfolders that a training run counts aren't read here; "
            "pass --set dataset.num_classes=N"
        )
    _check_size(typed.model, typed.dataset.num_classes)
    return typed.model.build(typed.dataset.num_classes)


def _at_most(model: Model | KLAutoencoderModel, num_classes: int) -> int:
    """Bytes that the weights can't exceed: each block has few matrices, none wider than its widest.

    80 is more than a block of any type has, nine for each convolution, down and up.
    """
    section = model.model_dump(warnings="none", exclude={"input_size"})
    sizes = [num_classes + 1, *_integers(section)]
    depths = _integers([section.get(key) for key in ("depth", "depths", "mapping_depth")])
    return 4 * 80 * max(sizes) ** 2 * (sum(depths) + 2)


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _integers(part)
    elif isinstance(value, int):
        yield value


def _check_size(model: Model | KLAutoencoderModel, num_classes: int) -> None:
    """Raises ConfigError for a model whose weights don't fit into the memory that is free."""
    there = memory.available()
    if there is None or _at_most(model, num_classes) < there:
        return  # without counting, for which torch takes a second to get ready
    probe = torch.empty(0)
    if probe.device.type == "meta" or type(probe) is not torch.Tensor:
        return  # a model without weights
    try:
        with torch.device("meta"):
            weights = model.build(num_classes).state_dict().values()
        size = sum(x.numel() * x.element_size() for x in weights)
    except RuntimeError as error:  # of sizes beyond 64 bits
        raise ConfigError(
            f"model: its sizes are too large ({str(error).splitlines()[0]})"
        ) from None
    try:
        memory.check(size, "the model's weights", "make its widths, depths or num_classes smaller")
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None


def make_denoiser_wrapper(config: Mapping[str, Any]) -> Callable[[nn.Module], nn.Module]:
    """A function that wraps the inner model into the Karras denoiser of a config.

    Of the config it reads the keys of `model` that a denoiser has: sigma_data, has_variance and
    those of the loss; each may be missing.
    """
    model = config["model"]
    if model.get("type") == "kl_autoencoder":
        raise ConfigError(
            "model.type: a kl_autoencoder is no denoiser; train it with train_autoencoder.py, and "
            "name it as autoencoder.location in the config of a latent model"
        )
    keys = {key: model[key] for key in DenoiserSection.model_fields if key in model}
    return DenoiserSection.model_validate(keys).build_wrapper()


def make_sample_density(config: Mapping[str, Any]) -> Callable[..., torch.Tensor]:
    """The training density of noise levels: a function of (shape, device=, dtype=).

    config: the `model` section of a config, of which only `sigma_sample_density` and what it leaves
    open are read. Raises ConfigError where that is missing.
    """
    if "sigma_sample_density" not in config:
        raise ConfigError("model.sigma_sample_density: is required")
    adapter: TypeAdapter[SampleDensity] = TypeAdapter(Density)
    density = adapter.validate_python(config["sigma_sample_density"])
    try:
        return with_bounds(density, config)
    except PydanticCustomError as error:
        raise ConfigError(f"model.sigma_sample_density: {error}") from None
