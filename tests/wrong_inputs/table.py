"""A row of the table, how it runs, and what has to hold for every one of them.

To add a wrong input, add a line to `commands.py`, `configs.py`, `files.py`, `data.py`, `calls.py`.
"""

import contextlib
import functools
import importlib.util
import io
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import runs

# What each script can't do without.
NEEDED = {
    "train": "--config tiny.json --name new/run --end-step 1 --num-workers 0 --batch-size 6",
    "sample": "--checkpoint a.safetensors -n 2 --steps 2 --device cpu --prefix new/out",
    "sample_clip_guided": "--checkpoint a.safetensors -n 2 --steps 2 --device cpu --prefix new/out",
    "evaluate": "--checkpoint a.safetensors -n 8 --steps 2 --device cpu --protocol random "
    "--resamples 0 --output-dir new/report",
    "convert_for_inference": "",
    "k_diffusion.config": "",
}


@dataclass(frozen=True)
class Row:
    """A command with a wrong input.

    script: a row of NEEDED. args: its arguments, as one line or a list; they follow the needed ones
    and replace those of the same flag. says: a pattern of the sentence. code: 2 for usage, 1 for
    the rest. config: changes to tiny.json, by dotted key, written to changed.json.
    """

    script: str
    args: str | list[str]
    says: str
    code: int = 1
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        args = self.args if isinstance(self.args, str) else repr(self.args)
        text = f"{self.script} {args} {dict(self.config) or ''}".strip()
        return text.encode("ascii", "backslashreplace").decode()[:200]

    @property
    def argv(self) -> list[str]:
        needed = NEEDED[self.script].split()
        args = self.args.split() if isinstance(self.args, str) else list(self.args)
        if self.config:
            args = ["--config", "changed.json", *args]
        return [*needed, *args]


@dataclass(frozen=True)
class Call:
    """A call of the library that has to raise a ValueError or OSError with a sentence.

    call: without arguments. says: a pattern of the sentence.
    """

    name: str
    call: Callable[[], Any]
    says: str


@functools.cache
def main_of(script: str) -> Callable[[], None]:
    if script == "k_diffusion.config":
        return lambda: runpy.run_module(script, run_name="__main__")
    spec = importlib.util.spec_from_file_location(f"wrong_{script}", runs.ROOT / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Everything in a folder, so that a file that was made or changed shows."""
    # following no links, opening nothing
    return sorted((str(p), p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*"))


def run(row: Row, folder: Path) -> tuple[Any, str, list[str]]:
    """Exit code, stderr and warnings of a row's command, in this process."""
    from accelerate.state import AcceleratorState

    said = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stderr(said),
        warnings.catch_warnings(record=True) as noise,
    ):
        warnings.simplefilter("default")
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", ResourceWarning)
        patch.chdir(folder)
        name = row.script if row.script.startswith("k_") else f"{row.script}.py"
        patch.setattr(sys, "argv", [name, *row.argv])
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            main_of(row.script)()
            code = 0
        except SystemExit as leaving:
            code = leaving.code
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
    if isinstance(code, str):  # as the interpreter does
        said.write(code + "\n")
        code = 1
    return code, said.getvalue(), [str(w.message) for w in noise]


def check_sentence(text: str, says: str) -> None:
    """One line that says what is expected, and nothing of Python's insides."""
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and lines[0].startswith("usage: "):
        lines = lines[next(i for i, line in enumerate(lines) if ": error: " in line) :]
    assert len(lines) == 1, f"one sentence, got:\n{text}"
    assert "Traceback" not in text
    assert "weights_only" not in text
    assert re.search(says, lines[0]), f"{lines[0]!r} doesn't say {says!r}"
