"""When to save a checkpoint, and a thread that writes it while training goes on."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from ..common.tensors import copy_to_host
from ..distributed import broadcast
from ..snapshots import snapshot_suffix, write_snapshot
from .run_files import prune, run_file, save_checkpoint
from .state import TrainState


class Saver:
    """Saves a run every `every` steps and every `minutes`; a context to save and train in.

    Training waits for the copy to host memory alone. A second checkpoint waits for the first to be
    written. An error of writing is raised at the next step, or on leaving the context. keep: how
    many checkpoints to keep, None for all. report: is told the path of each, once it is written.
    All processes make the same calls; the main one writes.
    """

    def __init__(
        self,
        accelerator: Any,
        name: str,
        state: TrainState,
        report: Callable[[Path], object],
        *,
        every: int,
        minutes: float,
        keep: int | None = None,
    ):
        self.main, self.name, self.report = accelerator.is_main_process, name, report
        self.every, self.seconds, self.keep = every, 60 * minutes, keep
        self.began = self.saved_at = time.monotonic()
        self.began_step = self.saved_step = self.look_at = state.step
        self.failed = False
        self.writing: Future[Path] | None = None
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
        """Copy the state to host memory, and write it from there; nothing if no step was done."""
        if state.step == self.saved_step or self.failed:
            return
        self.finish()
        if state.bad_at <= self.saved_step:  # all went well since the last checkpoint
            state.trouble = 0
        self.saved_at, self.saved_step, self.look_at = time.monotonic(), state.step, 0
        if self.main:
            values = copy_to_host(state.state_dict())
            self.writing = self.writer.submit(self._write, state.step, values, state.trouble)

    def _write(self, step: int, values: dict[str, Any], trouble: int) -> Path:
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
        if self.keep is not None:
            prune(self.name, step, self.keep, trouble)
        return path

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and report it. Raises its error."""
        if self.writing is None:
            return
        done, self.writing = self.writing, None
        try:
            path = done.result()
        except BaseException:
            self.failed = True
            raise
        self.report(path)

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
