"""Go on with a run: find its checkpoint, say which, and load it."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..checkpoints import CheckpointError, load_weights, read_checkpoint, read_weights
from ..checkpoints.runs import steps_of
from ..checkpoints.snapshots import branch_of
from ..distributed import broadcast, end_together, first_error
from .run_files import find_checkpoints, state_path
from .state import TrainState

# The sections of a config that name a frozen encoder, and what it gives a run.
_ENCODERS = {"autoencoder": "latents of another autoencoder", "text": "texts of another encoder"}


def resume(
    state: TrainState, name: str, path: Path | None, say: Callable[[str], object]
) -> Path | None:
    """Load the checkpoint at `path`, or if None the latest of the run called `name`, if any.

    If one of the run's own is damaged, it says so and takes the one before it; a damaged `path` is
    an error. Returns what was loaded. Raises CheckpointError.
    """
    candidates = find_checkpoints(name) if path is None else [path]
    if state.split is not None:  # they read their parts of the same ones
        candidates = broadcast(candidates)
    for candidate in candidates:
        checkpoint, error = _read(candidate, state.split)
        if checkpoint is None:
            if path is not None:
                raise CheckpointError(f"{error}{_others(name, path)}") from error
            say(f"{error}; going back to the checkpoint before it")
            continue
        _check_encoders(checkpoint["config"], state.config, candidate)
        for line in config_differences(checkpoint["config"], state.config):
            say(f"the config differs from the checkpoint's: {line}")
        for line in config_differences(checkpoint.get("run", {}), state.run):
            say(f"the run differs from the checkpoint's: {line}")
        state.load_state_dict(checkpoint, candidate)
        said = f"as {state_path(name)} says"
        if not state_path(name).exists():
            said = f"the newest that can be read, as {state_path(name)} is gone"
        how = "" if path is not None else f" ({said}; pass another --name to start anew)"
        say(f"resumed from {candidate} at step {state.step}{how}")
        return candidate
    if candidates:
        raise CheckpointError(
            f"none of the checkpoints of {name!r} can be read; pass another --name to start anew"
        )
    return None


def _check_encoders(old: Mapping[str, Any], new: Mapping[str, Any], path: Path) -> None:
    """Raises CheckpointError where a run was trained with another autoencoder or text encoder."""
    for key, what in _ENCODERS.items():
        theirs, ours = ((x.get(key) or {}).get("fingerprint") for x in (old, new))
        if theirs and ours and theirs != ours:
            source = new[key].get("precomputed") or new[key]["location"]
            raise CheckpointError(
                f"{path} was trained on the {what} (fingerprint {theirs}) than {source} ({ours}); "
                "pass the one that it was trained with, or another --name to start anew"
            )


def _read(path: Path, like: Any) -> tuple[dict[str, Any] | None, CheckpointError | None]:
    """A checkpoint, or why it can't be read; of processes that each read their part, by any one."""
    checkpoint, error = None, None
    try:
        checkpoint = read_checkpoint(path, like)
    except CheckpointError as caught:
        error = caught
    if like is not None and (error := first_error(error)) is not None:
        return None, error
    return checkpoint, error


def check_shared(accelerator: Any, name: str, resumed: Path | None, step: int) -> None:
    """Ends all processes where one resumed from something else than the main one did.

    resumed: what `resume` returned on this process. Raises CheckpointError on the main process.
    """
    mine = f"resumed from {resumed} at step {step}" if resumed else f"started at step {step}"
    others = broadcast(mine)
    error = None
    if mine != others:
        error = CheckpointError(
            f"process {accelerator.process_index} {mine}, and process 0 {others}; put the folder "
            f"of {name!r} where all machines see it under the same path"
        )
    end_together(accelerator, error)


def _others(name: str, path: Path) -> str:
    try:
        others = [str(p) for p in find_checkpoints(name) if p.resolve() != path.resolve()]
    except CheckpointError:
        others = []
    return f"; other checkpoints of {name!r}: {', '.join(others[:3])}" if others else ""


def config_differences(old: Any, new: Any, path: str = "") -> list[str]:
    """`path: old -> new` for every key in which two configs differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [
            line
            for key in new
            if key in old  # versions may add keys
            for line in config_differences(old[key], new[key], f"{path}.{key}" if path else key)
        ]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def resume_inference(state: TrainState, path: Path, say: Callable[[str], object]) -> None:
    """Start from the weights of an inference checkpoint (.safetensors), with a new optimizer."""
    weights = read_weights(path)
    load_weights(state.model, weights, path)
    load_weights(state.model_ema, weights, path)
    say(f"started from the weights of {path}")


def begin(state: TrainState, args: argparse.Namespace, accelerator: Any) -> None:
    """Resume as the flags ask for, on all processes, or start anew."""
    resumed = resume(state, args.name, args.resume, accelerator.print)
    check_shared(accelerator, args.name, resumed, state.step)
    own = resumed and resumed.resolve() in {p.resolve() for p in steps_of(args.name)}
    state.branch = branch_of(args.name, state.step, state.branch, bool(own))
    if args.resume_inference and not resumed:
        resume_inference(state, args.resume_inference, accelerator.print)
    if args.seed is not None:
        state.seed = args.seed
    if args.reset_ema:
        state.reset_ema()
