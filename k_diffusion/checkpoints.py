"""Checkpoint files: written whole, read without running code, held against a model."""

import json
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from .common.files import write_atomically
from .common.tensors import DTYPES


class CheckpointError(ValueError):
    """A checkpoint that can't be used; says which, why, and what else there is."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a training checkpoint (.pth) onto the CPU, without running code that it may hold.

    Raises CheckpointError naming a file that is missing, truncated or no checkpoint.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint {path}") from None
    except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, OSError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{path} is damaged or truncated: {reason}") from error
    missing = [k for k in ("config", "model") if not isinstance(state, dict) or k not in state]
    if missing:
        raise CheckpointError(f"{path} is no training checkpoint: it has no {missing}")
    return state


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights of an inference checkpoint (.safetensors), on the CPU.

    Raises CheckpointError naming a file that is missing or damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint {path}") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error


# Constants that a model computes its frequencies from: rounding them costs more than it saves.
_KEPT_WHOLE = ("freqs", "freqs_h", "freqs_w", "time_emb.weight", "aug_emb.weight")


def write_inference(
    path: Path, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], dtype: str
) -> None:
    """Write an inference checkpoint: safetensors, with the config as JSON in its metadata.

    dtype: a row of DTYPES, for floating-point weights but the constants of embeddings.
    """

    def convert(name: str, x: torch.Tensor) -> torch.Tensor:
        whole = not x.is_floating_point() or name.endswith(_KEPT_WHOLE)
        return (x if whole else x.to(DTYPES[dtype])).contiguous()

    data = save({k: convert(k, v) for k, v in weights.items()}, {"config": json.dumps(config)})
    write_atomically(path, lambda file: file.write(data))


def check_weights(model: nn.Module, weights: Mapping[str, Any], source: object) -> None:
    """Raises CheckpointError that says where names and shapes aren't those of the model."""
    want = model.state_dict()
    rows = {
        "missing from it": [k for k in want if k not in weights],
        "not in this model": [k for k in weights if k not in want],
        "of another shape": [
            f"{k} {tuple(weights[k].shape)} instead of {tuple(want[k].shape)}"
            for k in want
            if k in weights and weights[k].shape != want[k].shape
        ],
    }
    if differences := [f"{what}: {_some(keys)}" for what, keys in rows.items() if keys]:
        raise CheckpointError(
            f"{source} is of another architecture than the config's model; {'; '.join(differences)}"
        )


def _some(keys: Sequence[str], most: int = 4) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


def load_weights(model: nn.Module, weights: Mapping[str, Any], source: object) -> None:
    """Load a state dict whose names and shapes must be the model's. Raises CheckpointError."""
    check_weights(model, weights, source)
    model.load_state_dict(weights)
