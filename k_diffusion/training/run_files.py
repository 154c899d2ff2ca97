"""The files that a run writes and deletes: their names, its checkpoints, its own folder."""

import contextlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints import sharded, write_checkpoint
from ..checkpoints.runs import find_checkpoints, state_path, steps_of
from ..checkpoints.snapshots import PATTERN
from ..common.files import temporary_of, write_atomically
from ..common.options import UsageError

__all__ = ["find_checkpoints", "state_path"]

# Of a run with a folder of its own: what it is, and the page that shows it.
FACTS, PAGE = "run.json", "index.html"


def run_file(name: str, suffix: str) -> Path:
    """A file of the run called `name`, which may have folders before it."""
    path = Path(f"{name}_{suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def check_own_folder(name: str) -> None:
    """Raises UsageError where the folder of --output-dir holds another run, or a report."""
    state = state_path(name)
    own, folder = state.name.removesuffix("_state.json"), state.parent
    others = {
        m[1] or m[2]
        for p in folder.glob("*")
        if (m := re.fullmatch(r"(.+)_(?:state\.json|metrics\.csv)|\.(.+)\.lock", p.name))
        and own not in m.groups()
    }
    if others:
        raise UsageError(
            f"--output-dir {folder} holds another run, {min(others)}; pass another folder"
        )
    if (folder / PAGE).exists() and not Path(f"{name}_{FACTS}").exists():
        raise UsageError(
            f"--output-dir {folder} holds an {PAGE} of something else; pass another folder"
        )


def save_checkpoint(name: str, step: int, state: Mapping[str, Any], group: Any = None) -> Path:
    """Save a training checkpoint as NAME_STEP.pth and point NAME_state.json at it.

    group: of all processes, of which each then writes its shards; all must call it, and the first
    one does the rest.
    """
    path = run_file(name, f"{step:08}.pth")
    if group is not None:
        rest = sharded.write_shards(path, state, group)
        if rest is None:
            return path
        state = rest
    write_checkpoint(path, state)
    # as seen from the working directory, where older versions look for it; find_checkpoints looks
    # beside this file first, so that a run's folder can be moved
    text = json.dumps({"latest_checkpoint": path.as_posix()})
    write_atomically(state_path(name), lambda file: file.write(text.encode()))
    # shards of a checkpoint that this one replaced; a folder that can't be deleted is no error of
    # saving, and is tried again when the path is written again
    with contextlib.suppress(OSError):
        sharded.delete_shards(path, but=state.get(sharded.KEY, {}).get("folder"))
    return path


def before(name: str, step: int) -> Path | None:
    """A run's last checkpoint of a moment before `step` was taken, if there is one."""
    return next((path for path, at in steps_of(name).items() if at < step), None)


def prune(name: str, step: int, keep: int, trouble: int = 0) -> None:
    """Delete all of a run's checkpoints up to `step` but the newest `keep`.

    Snapshots of averages stay: another width is made of those of the whole run.
    trouble: a step, whose last checkpoint before it is kept as well; 0 for none.
    """
    kept = before(name, trouble) if trouble else None
    old = [path for path, at in steps_of(name).items() if at <= step][keep:]
    for path in old:
        if path != kept:
            sharded.delete_shards(path)  # first: what is left of a kill is deleted the next time
            path.unlink(missing_ok=True)


def remove_temporaries(name: str) -> None:
    """Delete what a killed run of this name had half written. Only for who holds its name."""
    state = state_path(name)
    own = re.compile(
        re.escape(state.name.removesuffix("_state.json"))
        + rf"_(\d{{8,}}\.(?:pth|dcp)|{PATTERN}|state\.json|demo_\d{{8,}}\.png|loss\.png|run\.json)"
        + (rf"|{re.escape(PAGE)}" if Path(f"{name}_{FACTS}").exists() else "")
    )
    for path in state.parent.glob(".*.part"):
        if own.fullmatch(temporary_of(path) or ""):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
