"""Training runs as one finds them: by their name, their folder, or one of their checkpoints."""

import json
import math
import re
from pathlib import Path

from . import CheckpointError

_STATE = "_state.json"


def state_path(name: str) -> Path:
    """The small file that names a run's latest checkpoint."""
    return Path(f"{name}{_STATE}")


def steps_of(name: str) -> dict[Path, int]:
    """All checkpoints beside a run's state file, and their steps, the newest first."""
    state = state_path(name)
    pattern = re.compile(re.escape(state.name.removesuffix(_STATE)) + r"_(\d{8,})\.pth")
    found = {p: int(m[1]) for p in state.parent.glob("*.pth") if (m := pattern.fullmatch(p.name))}
    return dict(sorted(found.items(), key=lambda item: item[1], reverse=True))


def _named(state: Path) -> Path:
    """The checkpoint that a state file names; an empty path where it can't be read."""
    try:
        return Path(json.loads(state.read_text())["latest_checkpoint"])
    except (ValueError, KeyError, TypeError):
        return Path()


def latest_step(name: str) -> int | None:
    """The step of the checkpoint that NAME_state.json names, which may be gone; None without."""
    state = state_path(name)
    found = re.search(r"_(\d{8,})\.pth$", _named(state).name) if state.exists() else None
    return int(found[1]) if found else None


def find_checkpoints(name: str) -> list[Path]:
    """A run's checkpoints, in the order in which to try them.

    First what NAME_state.json names, then the ones before it, the latest first; without that file
    all that are there. Raises CheckpointError if it names one and there are none.
    """
    state, steps = state_path(name), steps_of(name)
    if not state.exists():
        return list(steps)
    latest = _named(state)
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


def find_run(path: Path, suffix: str = _STATE) -> str | None:
    """The name, with its folder, of the run that `path` is the name, the folder or a checkpoint of.

    suffix: of the file that a run is known by. None where there is no such run. Raises
    CheckpointError for a folder of several.
    """
    names = [str(path)]
    if path.is_file():
        names = [str(path.with_name(re.sub(r"_\d{8,}\.pth$", "", path.name)))]
    elif path.is_dir() and (found := sorted(path.glob(f"*{suffix}"))):
        names = [str(p)[: -len(suffix)] for p in found]
    if len(names) > 1:
        shown = ", ".join(names[:4]) + (", ..." if names[4:] else "")
        raise CheckpointError(f"{path} holds {len(names)} runs; name one of {shown}")
    return names[0] if Path(f"{names[0]}{suffix}").is_file() else None


def folder_of(path: Path) -> Path:
    """That of a checkpoint, or of a run by its name; a run's folder is itself one."""
    return path if path.is_dir() else path.parent


def find_checkpoint(path: Path) -> Path:
    """The latest checkpoint of the run whose name or folder `path` is; another path as it is.

    Raises CheckpointError where a run's checkpoints are gone, or a folder holds several runs.
    """
    name = None if path.is_file() else find_run(path)
    return path if name is None else find_checkpoints(name)[0]
