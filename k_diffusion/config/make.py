"""Make what a config describes: the inner model, its denoiser, its noise-level density."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from . import model_schema as schema
from .load import ConfigError, parse


def make_model(config: Mapping[str, Any]) -> nn.Module:
    """The inner model, (x, sigma, **cond) -> F, of a config; weights at their initial values."""
    typed = parse(config, lenient=True)
    if typed.dataset.num_classes is None:
        raise ConfigError(
            "dataset.num_classes: the subfolders that a training run counts aren't read here; "
            "pass --set dataset.num_classes=N"
        )
    return MODELS[type(typed.model)](typed.model, typed.dataset.num_classes)


def _make_image_v1(model: schema.ImageV1, num_classes: int) -> nn.Module:
    from ..augmentation import KarrasAugmentWrapper
    from ..models.image_v1 import ImageDenoiserModelV1

    inner = ImageDenoiserModelV1(
        model.input_channels,
        model.mapping_out,
        model.depths,
        model.channels,
        model.self_attn_depths,
        model.cross_attn_depths,
        patch_size=model.patch_size,
        dropout_rate=model.dropout_rate,
        mapping_cond_dim=model.mapping_cond_dim + (9 if model.augment_wrapper else 0),
        unet_cond_dim=model.unet_cond_dim,
        cross_cond_dim=model.cross_cond_dim,
        skip_stages=model.skip_stages,
        has_variance=model.has_variance,
        num_classes=num_classes,
    )
    return KarrasAugmentWrapper(inner) if model.augment_wrapper else inner


def _make_image_transformer_v1(model: schema.ImageTransformerV1, num_classes: int) -> nn.Module:
    from ..models.image_transformer_v1 import ImageTransformerDenoiserModelV1

    return ImageTransformerDenoiserModelV1(
        n_layers=model.depth,
        d_model=model.width,
        d_ff=model.d_ff,
        in_features=model.input_channels,
        out_features=model.input_channels,
        patch_size=model.patch_size,
        num_classes=num_classes,
        dropout=model.dropout_rate,
        sigma_data=model.sigma_data,
        attn_backend=model.attn_backend,
    )


def _make_image_transformer_v2(model: schema.ImageTransformerV2, num_classes: int) -> nn.Module:
    from ..models import image_transformer_v2 as v2

    specs: dict[type, Callable[[Any], v2.AttentionSpec]] = {
        schema.GlobalAttention: lambda a: v2.GlobalAttentionSpec(a.d_head, a.backend),
        schema.NeighborhoodAttention: lambda a: v2.NeighborhoodAttentionSpec(
            a.d_head, a.kernel_size, a.backend
        ),
        schema.ShiftedWindowAttention: lambda a: v2.ShiftedWindowAttentionSpec(
            a.d_head, a.window_size, backend=a.backend
        ),
        schema.NoAttention: lambda a: v2.NoAttentionSpec(),
    }
    attns: Any = model.self_attns
    for level, attn in enumerate(attns):
        # checked here and not by the schema: a config that never makes its model may break it
        if (k := getattr(attn, "kernel_size", 0)) > min(tokens := model.tokens(level)):
            raise ConfigError(
                f"model.self_attns[{level}]: kernel_size {k} is larger than the {tokens[0]} x "
                f"{tokens[1]} tokens of level {level}; use at most {min(tokens)}, or global "
                "attention"
            )
    rows = zip(model.depths, model.widths, model.d_ffs or [], attns, model.dropout_rate)  # type: ignore[arg-type]
    return v2.ImageTransformerDenoiserModelV2(
        levels=[v2.LevelSpec(d, w, ff or 0, specs[type(a)](a), drop) for d, w, ff, a, drop in rows],
        mapping=v2.MappingSpec(
            model.mapping_depth,
            model.mapping_width,
            model.mapping_d_ff or 0,
            model.mapping_dropout_rate,
        ),
        in_channels=model.input_channels,
        out_channels=model.input_channels,
        patch_size=model.patch_size,
        num_classes=num_classes,
        mapping_cond_dim=model.mapping_cond_dim,
    )


MODELS: dict[type, Callable[[Any, int], nn.Module]] = {
    schema.ImageV1: _make_image_v1,
    schema.ImageTransformerV1: _make_image_transformer_v1,
    schema.ImageTransformerV2: _make_image_transformer_v2,
}


def make_denoiser_wrapper(config: Mapping[str, Any]) -> Callable[[nn.Module], nn.Module]:
    """A function that wraps the inner model into the Karras denoiser of a config."""
    from .. import denoisers

    model = parse(config, lenient=True).model
    cls: type[denoisers.Denoiser] = denoisers.Denoiser
    if model.loss_config == "simple":
        cls = denoisers.SimpleLossDenoiser
    elif model.has_variance:
        cls = denoisers.DenoiserWithVariance
    return partial(
        cls, sigma_data=model.sigma_data, weighting=model.loss_weighting, scales=model.loss_scales
    )


def make_sample_density(config: Mapping[str, Any]) -> Callable[..., torch.Tensor]:
    """The training density of noise levels: a function of (shape, device=, dtype=).

    config: the `model` section of a config.
    """
    from .. import densities

    model = parse({"model": config}, lenient=True).model
    d = model.sigma_sample_density
    rows: dict[type, Callable[[Any], Callable[..., torch.Tensor]]] = {
        schema.LogNormal: lambda d: partial(
            densities.rand_log_normal,
            loc=d.mean,
            scale=d.std,
        ),
        schema.LogLogistic: lambda d: partial(
            densities.rand_log_logistic,
            loc=_or(d.loc, math.log(model.sigma_data)),
            scale=d.scale,
            min_value=d.min_value,
            max_value=_or(d.max_value, float("inf")),
        ),
        schema.LogUniform: lambda d: partial(
            densities.rand_log_uniform,
            min_value=_or(d.min_value, model.sigma_min),
            max_value=_or(d.max_value, model.sigma_max),
        ),
        schema.VDiffusion: lambda d: partial(
            densities.rand_v_diffusion,
            sigma_data=model.sigma_data,
            min_value=d.min_value,
            max_value=d.max_value,
        ),
        schema.SplitLogNormal: lambda d: partial(
            densities.rand_split_log_normal,
            loc=d.mean,
            scale_1=d.std_1,
            scale_2=d.std_2,
        ),
        schema.CosineInterpolated: lambda d: partial(
            densities.rand_cosine_interpolated,
            image_d=max(model.input_size),
            noise_d_low=d.noise_d_low,
            noise_d_high=_or(d.noise_d_high, max(model.input_size)),
            sigma_data=model.sigma_data,
            min_value=_or(d.min_value, min(model.sigma_min, 1e-3)),
            max_value=_or(d.max_value, max(model.sigma_max, 1e3)),
        ),
    }
    return rows[type(d)](d)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
