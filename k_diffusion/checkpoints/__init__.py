"""Checkpoint files: written whole, read without running code, held against a model.

`runs` finds those of a run by its name; `sharded` are those that several processes write together;
`snapshots` are averages of a run's weights, to combine later.
"""

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from ..common.files import write_atomically
from ..common.shards import load_whole, local
from ..common.tensors import DTYPES, nbytes
from ..common.untrusted import check_safetensors_file, check_torch_file, get_safetensors_metadata
from . import sharded


class CheckpointError(ValueError):
    """A checkpoint that can't be used; says which, why, and what else there is."""


def read_checkpoint(
    path: str | Path, like: Any = None, only: Collection[str] | None = None
) -> dict[str, Any]:
    """Read a training checkpoint (.pth) onto the CPU, without running code that it may hold.

    like: a DTensor, split over processes that each want their part. From a checkpoint of shards
    each then reads its own, on the device of that tensor; of a whole one, tensors stay in the file
    until they are used, in memory that processes share. only: the keys whose tensors are wanted,
    None for all; others of a checkpoint of shards may come as meta tensors.
    Raises CheckpointError naming a file that is missing, truncated, larger than it is, changed
    since it was written (each part has a CRC-32), that holds code, or is no checkpoint.
    """
    if Path(path).suffix == ".safetensors":
        raise CheckpointError(f"{path} is an inference checkpoint; a training checkpoint is needed")
    state = read_torch(path, mapped=like is not None)
    keys = state if isinstance(state, dict) else {}
    needed = ["config", "model", *(["model_ema"] if sharded.KEY in keys else [])]
    if missing := [k for k in needed if k not in keys]:
        has = f" but {_some(list(map(str, keys)))}" if keys else ""
        raise CheckpointError(f"{path} is no training checkpoint: it has no {missing}{has}")
    _check_parts(state, path)
    try:
        return sharded.fill(Path(path), state, like, only)
    except (ValueError, OSError) as error:
        raise CheckpointError(str(error)) from None


def read_averaged(path: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config and the averaged weights of a training checkpoint. Raises CheckpointError."""
    state = read_checkpoint(path, only=("model_ema",))
    return state["config"], state.get("model_ema", state["model"])


def read_torch(path: str | Path, mapped: bool = False) -> Any:
    """What torch.save has written to a file, on the CPU, without running code that it may hold.

    mapped: leave its tensors in the file until they are used. Raises CheckpointError as
    `read_checkpoint` does, but for what is no checkpoint.
    """
    try:
        check_torch_file(path)
        if wrong := _damaged(path):
            raise ValueError(f"{path} is damaged or truncated: {wrong}")
    except (ValueError, OSError) as error:
        raise CheckpointError(str(error)) from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        # torch's own text tells how to switch the check off, which nobody should
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"code ({found[1]})" if found else "more than weights and plain values"
        raise CheckpointError(
            f"{path} holds {what}, which isn't run; ask its author for a .safetensors file"
        ) from None
    except Exception as error:  # of whatever kind, of a damaged pickle
        reason = str(error).split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} is damaged or truncated: {reason}") from None


def _check_parts(state: Mapping[str, Any], path: object) -> None:
    """Raises CheckpointError unless each part of a training checkpoint is of its kind."""
    for key in ("config", "ema_stats", "opt", "sched", "ema_sched", "power_ema"):
        if not isinstance(state.get(key) or {}, Mapping):
            raise CheckpointError(f"{path} is no training checkpoint: its {key!r} is no dict")
    for key in ("model", "model_ema"):
        _check_tensors(state.get(key, state["model"]), f"{path} ({key})")
    for width, profile in (state.get("power_ema") or {}).items():
        if not isinstance(profile, Mapping) or not {"began", "images", "weights"} <= profile.keys():
            raise CheckpointError(f"{path} is no training checkpoint: 'power_ema' lacks values")
        _check_tensors(profile["weights"], f"{path} (power_ema {width})")
    opt = state.get("opt", {"state": {}, "param_groups": []})
    for key, kind in (("state", Mapping), ("param_groups", list)):
        if not isinstance(opt.get(key), kind):
            raise CheckpointError(f"{path} is no training checkpoint: its 'opt' has no {key!r}")
    if not all(isinstance(g, Mapping) and "params" in g for g in opt["param_groups"]):
        raise CheckpointError(f"{path} is no training checkpoint: 'opt' has groups without params")
    for key in ("sched", "ema_sched"):
        if key in state and not isinstance(state[key].get("last_epoch"), int):
            raise CheckpointError(
                f"{path} is no training checkpoint: its {key!r} has no 'last_epoch'"
            )


def _check_tensors(weights: Any, source: object) -> None:
    """Raises CheckpointError unless these are named tensors, each no larger than is stored."""
    tensors = weights.values() if isinstance(weights, Mapping) else [None]
    if not all(isinstance(x, torch.Tensor) for x in tensors):
        raise CheckpointError(f"{source} has no weights: it must hold tensors by their names")
    for name, x in weights.items():
        if x.numel() * x.element_size() > x.untyped_storage().nbytes():
            raise CheckpointError(
                f"{source} says that {name} has shape {tuple(x.shape)}, but stores less of it"
            )


def _damaged(path: str | Path) -> str | None:
    """What is wrong with the checksums in a file, which PyTorch doesn't look at, if anything is."""
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
    except Exception as error:  # of the file's format, of whatever kind
        return str(error)
    return f"its {broken} hasn't got the checksum that it was written with" if broken else None


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a training checkpoint (.pth), whole or not at all; torch.load reads it.

    Raises OSError; DiskFullError before it begins if it can't fit.
    """
    values = dict(state)
    write_atomically(path, lambda file: torch.save(values, file), nbytes(values))


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights of an inference checkpoint (.safetensors), on the CPU.

    Raises CheckpointError naming a file that is missing, damaged, or whose digest isn't that of its
    contents. Files of other programs, without a digest, are read as they are.
    """
    try:
        check_safetensors_file(path)
        weights = load_file(path)
        metadata = get_safetensors_metadata(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(str(error)) from None
    _check_tensors(weights, path)
    if metadata.get(_DIGEST, found := digest(weights, metadata)) != found:
        raise CheckpointError(
            f"{path} is damaged: its contents have SHA-256 {found}, not the one that it states"
        )
    return weights


# Constants that a model computes its frequencies from: rounding them costs more than it saves.
_KEPT_WHOLE = ("freqs", "freqs_h", "freqs_w", "time_emb.weight", "aug_emb.weight")


def write_inference(
    path: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    dtype: str,
    snapshot: str = "",
) -> None:
    """Write an inference checkpoint: safetensors, with the config as JSON in its metadata.

    dtype: a row of DTYPES, for floating-point weights but the constants of embeddings. snapshot:
    what the metadata says of an average, if it is one of `snapshots`. Raises CheckpointError for
    weights that aren't finite, or no longer are in that dtype.
    """
    check_finite(weights, path)

    def convert(name: str, x: torch.Tensor) -> torch.Tensor:
        whole = not x.is_floating_point() or name.endswith(_KEPT_WHOLE)
        return (x if whole else x.to(DTYPES[dtype])).contiguous()

    tensors = {k: convert(k, v) for k, v in weights.items()}
    check_finite(tensors, f"{path} in {dtype}", "choose bf16 or fp32")
    metadata = {"config": json.dumps(config)}
    if snapshot:
        metadata["snapshot"] = snapshot
    data = save(tensors, {**metadata, _DIGEST: digest(tensors, metadata)})
    write_atomically(path, lambda file: file.write(data), len(data))


_DIGEST = "sha256"


def digest(weights: Mapping[str, torch.Tensor], metadata: Mapping[str, str] = {}) -> str:
    """SHA-256 of names, types, shapes and bytes of all weights, and of the metadata.

    weights: of any shapes (...), by their names. metadata: a file's, of which the config and what
    it says of an average count.
    """
    sha = hashlib.sha256((metadata.get("config", "") + metadata.get("snapshot", "")).encode())
    for name, x in sorted(weights.items()):
        sha.update(f"\n{name} {x.dtype} {tuple(x.shape)}\n".encode())
        sha.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def check_weights(model: nn.Module, weights: Mapping[str, Any], source: object) -> None:
    """Raises CheckpointError that says where names and shapes aren't those of the model.

    weights: each of the shape that the model's has, and finite.
    """
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
    check_finite(weights, source)


def check_finite(
    weights: Mapping[str, torch.Tensor],
    source: object,
    remedy: str = "take the checkpoint of an earlier step",
) -> None:
    """Raises CheckpointError naming weights that are NaN or infinite.

    weights: of any shapes (...), by their names; of split ones, this process's shards. remedy:
    ends the sentence.
    """
    shards = {k: local(x) for k, x in weights.items() if x.is_floating_point()}
    if bad := [k for k, x in shards.items() if not x.isfinite().all()]:
        raise CheckpointError(f"{source} has NaN or infinite weights: {_some(bad)}; {remedy}")


def _some(keys: Sequence[str], most: int = 4) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


def load_weights(model: nn.Module, weights: Mapping[str, Any], source: object) -> None:
    """Load a state dict whose names and shapes must be the model's. Raises CheckpointError."""
    check_weights(model, weights, source)
    load_whole(model, weights)
