"""Checkpoint files: written whole or not at all, read without running code, found again."""

import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn


class CheckpointError(ValueError):
    """A checkpoint that can't be used; says which, why, and what else there is."""


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file under another name, flush it to disk and give it its name.

    At any moment the name holds either the old file or the new one, whole. Raises OSError with the
    path if the folder can't be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def run_file(name: str, suffix: str) -> Path:
    """A file of the run called `name`, which may have folders before it."""
    path = Path(f"{name}_{suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def state_path(name: str) -> Path:
    """The small file that names a run's latest checkpoint."""
    return Path(f"{name}_state.json")


def save_checkpoint(name: str, step: int, state: Mapping[str, Any]) -> Path:
    """Save a training checkpoint as NAME_STEP.pth and point NAME_state.json at it."""
    path = run_file(name, f"{step:08}.pth")
    write_atomically(path, lambda file: torch.save(dict(state), file))
    # the name alone: a run's folder can be moved
    text = json.dumps({"latest_checkpoint": path.name})
    write_atomically(state_path(name), lambda file: file.write(text.encode()))
    return path


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
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint {path}") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Constants that a model computes its frequencies from: rounding them costs more than it saves.
_KEPT_WHOLE = ("freqs", "freqs_h", "freqs_w", "time_emb.weight", "aug_emb.weight")


def write_inference(
    path: Path, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], dtype: str
) -> None:
    """Write an inference checkpoint: safetensors, with the config as JSON in its metadata.

    dtype: a row of DTYPES, for floating-point weights but the constants of embeddings.
    """
    from safetensors.torch import save

    def convert(name: str, x: torch.Tensor) -> torch.Tensor:
        whole = not x.is_floating_point() or name.endswith(_KEPT_WHOLE)
        return (x if whole else x.to(DTYPES[dtype])).contiguous()

    data = save({k: convert(k, v) for k, v in weights.items()}, {"config": json.dumps(config)})
    write_atomically(path, lambda file: file.write(data))


def find_checkpoints(name: str) -> list[Path]:
    """A run's checkpoints, in the order in which to try them; none without NAME_state.json.

    First what NAME_state.json names, then the ones before it, the latest first. Raises
    CheckpointError if there are none of them.
    """
    state = state_path(name)
    if not state.exists():
        return []
    folder, stem = state.parent, state.name.removesuffix("_state.json")
    pattern = re.compile(re.escape(stem) + r"_(\d{8,})\.pth")
    steps = {p: int(m[1]) for p in folder.glob("*.pth") if (m := pattern.fullmatch(p.name))}
    try:
        latest = Path(json.loads(state.read_text())["latest_checkpoint"])
    except (ValueError, KeyError, TypeError):
        latest = Path()
    # other versions wrote a path that counts from the working directory
    named = [p for p in (folder / latest.name, latest) if p.is_file()][:1]
    # those after it belong to a run that was left for an earlier checkpoint
    end = steps.get(named[0], math.inf) if named else math.inf
    before = sorted((p for p in steps if steps[p] < end), key=steps.__getitem__, reverse=True)
    found = named + before
    if not found:
        raise CheckpointError(
            f"{state} names a checkpoint that is gone ({latest.name or 'unreadable'}), and there "
            f"is none before it; delete {state} to start anew"
        )
    return found


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
