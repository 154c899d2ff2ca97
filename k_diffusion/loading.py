"""A denoiser from a checkpoint file."""

from pathlib import Path
from typing import Any

from torch import nn

from . import checkpoints
from .config import load_config, make_denoiser_wrapper, make_model


def load_denoiser(
    path: str | Path, config: str | Path | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The denoiser of an inference checkpoint (.safetensors) or, by its averaged weights, of a
    training checkpoint (.pth); in float32, on the CPU, in evaluation mode.

    config: a config file; by default the one in the checkpoints. Returns the denoiser and the
    config. Raises ValueError for a damaged file or one of another architecture.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        weights = checkpoints.read_weights(path)
        loaded = load_config(config or path, strict=True)
    else:
        state = checkpoints.read_checkpoint(path)
        weights = state.get("model_ema", state["model"])
        loaded = load_config(config or state["config"], strict=config is not None)
    model = make_model(loaded)
    checkpoints.load_weights(model, weights, path)
    return make_denoiser_wrapper(loaded)(model).eval().requires_grad_(False), loaded
