"""The files of a run: their names, its checkpoints, and which of them is the latest."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints import CheckpointError, write_checkpoint
from ..common.files import temporary_of, write_atomically
from ..snapshots import PATTERN


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
    write_checkpoint(path, state)
    # as seen from the working directory, where older versions look for it; find_checkpoints looks
    # beside this file first, so that a run's folder can be moved
    text = json.dumps({"latest_checkpoint": path.as_posix()})
    write_atomically(state_path(name), lambda file: file.write(text.encode()))
    return path


def _checkpoints(name: str) -> dict[Path, int]:
    """All checkpoints beside a run's state file, and their steps, the newest first."""
    state = state_path(name)
    pattern = re.compile(re.escape(state.name.removesuffix("_state.json")) + r"_(\d{8,})\.pth")
    found = {p: int(m[1]) for p in state.parent.glob("*.pth") if (m := pattern.fullmatch(p.name))}
    return dict(sorted(found.items(), key=lambda item: item[1], reverse=True))


def find_checkpoints(name: str) -> list[Path]:
    """A run's checkpoints, in the order in which to try them.

    First what NAME_state.json names, then the ones before it, the latest first; without that file
    all that are there. Raises CheckpointError if it names one and there are none.
    """
    state, steps = state_path(name), _checkpoints(name)
    if not state.exists():
        return list(steps)
    try:
        latest = Path(json.loads(state.read_text())["latest_checkpoint"])
    except (ValueError, KeyError, TypeError):
        latest = Path()
    # a moved folder has its own checkpoints; the path counts from the working directory
    named = [p for p in (state.parent / latest.name, latest) if p.is_file()][:1]
    # those after it belong to a run that was left for an earlier checkpoint
    end = steps.get(named[0], math.inf) if named else math.inf
    found = named + [p for p in steps if steps[p] < end]
    if not found:
        raise CheckpointError(
            f"{state} names a checkpoint that is gone ({latest.name or 'unreadable'}), and there "
            f"is none before it; delete {state} to start anew"
        )
    return found


def before(name: str, step: int) -> Path | None:
    """A run's last checkpoint of a moment before `step` was taken, if there is one."""
    return next((path for path, at in _checkpoints(name).items() if at < step), None)


def prune(name: str, step: int, keep: int, trouble: int = 0) -> None:
    """Delete all of a run's checkpoints up to `step` but the newest `keep`.

    Snapshots of averages stay: another width is made of those of the whole run.
    trouble: a step, whose last checkpoint before it is kept as well; 0 for none.
    """
    kept = before(name, trouble) if trouble else None
    old = [path for path, at in _checkpoints(name).items() if at <= step][keep:]
    for path in old:
        if path != kept:
            path.unlink(missing_ok=True)


def remove_temporaries(name: str) -> None:
    """Delete what a killed run of this name had half written. Only for who holds its name."""
    state = state_path(name)
    own = re.compile(
        re.escape(state.name.removesuffix("_state.json"))
        + rf"_(\d{{8,}}\.pth|{PATTERN}|state\.json|demo_\d{{8,}}\.png|loss\.png)"
    )
    for path in state.parent.glob(".*.part"):
        if own.fullmatch(temporary_of(path) or ""):
            path.unlink(missing_ok=True)
