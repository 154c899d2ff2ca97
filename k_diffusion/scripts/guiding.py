"""The flags of the sampling scripts on guidance, and the denoiser that they make."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import conditions, guidance
from ..common import options
from ..encoders.autoencoder import Autoencoder, find_autoencoder
from ..loading import load_denoiser

_ALIKE = 1e-3  # of the units of latents


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Adds the flags of guidance."""
    file: dict[str, Any] = {"type": options.path, "metavar": "FILE"}
    number: dict[str, Any] = {"type": options.finite, "metavar": "X"}
    add = p.add_argument_group("guidance").add_argument
    text = "strength of classifier-free guidance; 1: no guidance"
    add("--cfg-scale", default=1.0, **number, help=text)
    text = "noise levels between which to use it; else everywhere"
    add(
        "--cfg-interval",
        nargs=2,
        type=options.non_negative_number,
        metavar=("LOW", "HIGH"),
        help=text,
    )
    text = "checkpoint of a weaker model to guide away from"
    add("--autoguidance", **file, help=text)
    text = "its strength; 1: no guidance (default: 2.0)"
    add("--autoguidance-scale", **number, help=text)
    text = f"how --cfg-scale combines the two estimates: {', '.join(guidance.RULES)}"
    add("--cfg-rule", choices=guidance.RULES, default="linear", metavar="NAME", help=text)
    names: dict[str, Any] = {"nargs": "+", "default": [], "metavar": "NAME"}
    text = "guide away from the transformer without these blocks, such as mid_level.1"
    add("--skip-layers", **names, help=text)
    text = "guide away from it with the identity for the attention maps of these, such as mid_level"
    add("--identity-attention", **names, help=text)
    text = "strength of both; 1: no guidance (default: 2.0)"
    add("--perturbed-scale", **number, help=text)


def make_guidance(
    denoiser: nn.Module, config: dict[str, Any], args: argparse.Namespace, device: torch.device
) -> nn.Module:
    """A denoiser with the guidance that the flags ask for.

    Raises ValueError where the model has no conditions to guide by, or no such blocks, the
    checkpoint of the weaker model is one of other images, latents, classes or texts, or flags
    don't go together.
    """
    model = denoiser
    if args.autoguidance is not None:
        given = getattr(args, "autoencoder", None) if config.get("autoencoder") else None
        weak, other = load_denoiser(args.autoguidance, autoencoder=given)
        for part, key in (
            ("model", "input_channels"),
            ("model", "input_size"),
            ("dataset", "num_classes"),
        ):
            if other[part][key] != config[part][key]:
                raise ValueError(
                    f"{args.autoguidance} has {key} {other[part][key]}, but the model it is to "
                    f"guide has {config[part][key]}"
                )
        _check_latents(args.autoguidance, find_autoencoder(weak), find_autoencoder(denoiser))
        _check_texts(args.autoguidance, other, config)
        scale = 2.0 if args.autoguidance_scale is None else args.autoguidance_scale
        denoiser = guidance.AutoguidedDenoiser(denoiser, weak.to(device), scale)
    if args.skip_layers or args.identity_attention:
        perturbed = guidance.PerturbedDenoiser(model, args.skip_layers, args.identity_attention)
        scale = 2.0 if args.perturbed_scale is None else args.perturbed_scale
        denoiser = guidance.AutoguidedDenoiser(denoiser, perturbed, scale)
    if args.cfg_scale == 1:
        return denoiser
    size, coder = getattr(args, "size", None), find_autoencoder(denoiser)
    if size and coder is not None:
        size = coder.latent_shape((coder.image_channels, *size))[1:]
    null: dict[str, Any] = {
        k: x.to(device) for k, x in conditions.null(config, "--cfg-scale", size).items()
    }
    rule = guidance.RULES[args.cfg_rule](config["model"]["sigma_data"])
    guided = guidance.CFGDenoiser(denoiser, args.cfg_scale, combine=rule, **null)
    return guidance.IntervalDenoiser(guided, *args.cfg_interval) if args.cfg_interval else guided


def _check_latents(path: Path, weak: Autoencoder | None, model: Autoencoder | None) -> None:
    """Raises ValueError unless the weaker model at `path` has the model's latents in its units."""
    prints = [x and x.fingerprint for x in (weak, model)]
    if prints[0] != prints[1]:
        raise ValueError(
            f"{path} has the autoencoder {prints[0]}, but the model it is to guide {prints[1]}; "
            "both must be of one kind of latents"
        )
    if weak is None or model is None:
        return
    # what is measured twice may differ in its last digits
    unit, zero, other = (x.cpu() for x in (model.scale, model.shift, weak.shift))
    same = torch.allclose(weak.scale.cpu(), unit, rtol=_ALIKE, atol=0)
    if not same or not torch.allclose(other * unit, zero * unit, rtol=0, atol=_ALIKE):
        raise ValueError(
            f"{path} has its latents in other units (autoencoder.mean, autoencoder.std, "
            "model.sigma_data) than the model it is to guide; train it with the same"
        )


def _check_texts(path: Path, weak: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Raises ValueError where two models with these configs are told texts by other encoders."""
    prints = [(config.get("text") or {}).get("fingerprint") for config in (weak, model)]
    if all(prints) and prints[0] != prints[1]:
        raise ValueError(
            f"{path} has the text encoder {prints[0]}, but the model it is to guide {prints[1]}; "
            "both must be told by the same"
        )
