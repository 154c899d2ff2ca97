"""When to save a checkpoint, and a thread that writes it while training goes on."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from ..checkpoints.snapshots import snapshot_suffix, write_snapshot
from ..common import memory
from ..common.shards import gather_to_host
from ..common.tensors import copy_to_host, nbytes
from ..distributed import broadcast, end_together, sharded
from .run_files import prune, run_file, save_checkpoint
from .state import TrainState


class Saver:
    """Saves a run every `every` steps and every `minutes`; a context to save and train in.

    Training waits for the copy to host memory alone, or until all is written where there is no
    memory for a copy. A second checkpoint waits for the first to be written. An error of writing is
    raised at the next step, or on leaving the context. keep: how many checkpoints to keep, None for
    all. report: is told the path of each, once it is written. say: is told what went otherwise. All
    processes make the same calls; the main one writes.
    """

    def __init__(
        self,
        accelerator: Any,
        name: str,
        state: TrainState,
        report: Callable[[Path], object],
        say: Callable[[str], object],
        *,
        every: int,
        minutes: float,
        keep: int | None = None,
    ):
        self.accelerator, self.main, self.name = accelerator, accelerator.is_main_process, name
        self.report, self.say = report, say
        self.every, self.seconds, self.keep = every, 60 * minutes, keep
        self.began = self.saved_at = time.monotonic()
        self.began_step = self.saved_step = self.look_at = state.step
        self.failed = self.crowded = False
        self.writing: Future[tuple[Path, OSError | None]] | None = None
        # joined when the interpreter ends, too
        self.writer = ThreadPoolExecutor(1, "checkpoint")

    def due(self, state: TrainState) -> bool:
        """Whether to save at this step: all processes get the same answer."""
        if self.writing is not None and self.writing.done():
            self.finish()
        if state.step % self.every == 0:
            return True
        if state.step < self.look_at:
            return False
        # The clock is the main process's. The others are told when to look at it again, half the
        # time that is left from now, so that they don't wait for each other at every step.
        now = time.monotonic()
        left = self.saved_at + self.seconds - now
        pace = (now - self.began) / max(1, state.step - self.began_step)
        wait = int(min(left / max(pace, 1e-6) / 2, 1e9))
        steps = broadcast(0 if left < pace else max(1, wait))
        self.look_at = state.step + steps
        return steps == 0

    def save(self, state: TrainState) -> None:
        """Copy the state to host memory, and write it from there; nothing if no step was done.

        Raises an error of writing where there is no memory for a copy.
        """
        if state.step == self.saved_step or self.failed:
            return
        self.finish()
        if state.bad_at <= self.saved_step:  # all went well since the last checkpoint
            state.trouble = 0
        values: dict[str, Any] = {}
        copied: dict[str, Any] | None = values
        if sharded(self.accelerator):
            values = state.state_dict()
            self._check_memory(values)
            copied = values = gather_to_host(values, self.main)
        elif self.main:
            values = state.state_dict()
            copied = _copy(values)
        self.saved_at, self.saved_step, self.look_at = time.monotonic(), state.step, 0
        if self.main:
            self.writing = self.writer.submit(
                self._write, state.step, values if copied is None else copied, state.trouble
            )
        if copied is None:
            if not self.crowded:
                self.crowded = True
                self.say("the host has no memory for a copy of the state: training waits for saves")
            self.finish()

    def _check_memory(self, values: dict[str, Any]) -> None:
        """Raises ValueError on the main process, and ends the others, if it can't hold it all."""
        error = None
        try:
            if self.main:
                remedy = "its process puts the shards together: give its machine more"
                memory.check(nbytes(values), "the state to be saved", remedy)
        except ValueError as caught:
            error = caught
        end_together(self.accelerator, error)

    def _write(
        self, step: int, values: dict[str, Any], trouble: int
    ) -> tuple[Path, OSError | None]:
        """The path of the checkpoint, and an error of deleting old ones."""
        # before the checkpoint: a run that resumes from it has all snapshots up to there
        for width, profile in (values.get("power_ema") or {}).items():
            write_snapshot(
                run_file(self.name, snapshot_suffix(step, width)),
                values["config"],
                profile,
                step=step,
                width=width,
                since=self.began_step,
            )
        path = save_checkpoint(self.name, step, values)
        try:
            if self.keep is not None:
                prune(self.name, step, self.keep, trouble)
        except OSError as error:
            return path, error
        return path, None

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and report it. Raises its error."""
        if self.writing is None:
            return
        done, self.writing = self.writing, None
        try:
            path, left = done.result()
        except BaseException:
            self.failed = True
            raise
        self.report(path)
        if left is not None:
            self.say(f"can't delete old checkpoints ({left}); going on")

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.finish()
        finally:
            self.writer.shutdown()


def _copy(values: dict[str, Any]) -> dict[str, Any] | None:
    """A copy on the host, or None if there is no memory for one."""
    there = memory.available()
    if there is not None and nbytes(values) > there:
        return None
    try:
        return copy_to_host(values)
    except (MemoryError, RuntimeError) as error:
        if not memory.ran_out(error):
            raise
        return None
