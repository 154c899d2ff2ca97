"""The files of a run: their names, its checkpoints, and which of them is the latest."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import CheckpointError
from ..common.files import write_atomically


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
    # as seen from the working directory, where older versions look for it; find_checkpoints looks
    # beside this file first, so that a run's folder can be moved
    text = json.dumps({"latest_checkpoint": path.as_posix()})
    write_atomically(state_path(name), lambda file: file.write(text.encode()))
    return path


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
    # a moved folder has its own checkpoints; the path counts from the working directory
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
