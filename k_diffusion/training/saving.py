"""When to save a checkpoint, and a thread that writes it while training goes on."""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from ..checkpoints.snapshots import snapshot_suffix, write_snapshot
from ..common import memory
from ..common.shards import copy_to_host_mesh, gather_to_host, local
from ..common.tensors import copy_to_host, map_tensors, nbytes
from ..distributed import any_process, broadcast, end_together, sharded
from .run_files import prune, run_file, save_checkpoint
from .state import TrainState


class Saver:
    """Saves a run every `every` steps and every `minutes`; a context to save and train in.

    Training waits for the copy to host memory alone, or until all is written where there is no
    memory for a copy. A second checkpoint waits for the first to be written. An error of writing is
    raised at the next step, or on leaving the context. keep: how many checkpoints to keep, None for
    all. report: is told the path of each, once it is written. say: is told what went otherwise.
    mesh: of `sharding.make_host_mesh`, through which each process writes its shards; without it,
    the main process gets them all and writes. All processes make the same calls.
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
        mesh: Any = None,
    ):
        self.accelerator, self.main, self.name = accelerator, accelerator.is_main_process, name
        self.report, self.say = report, say
        self.every, self.seconds, self.keep = every, 60 * minutes, keep
        self.mesh = mesh
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
        profiles = None
        crowded = False
        if self.mesh is not None:
            values = state.state_dict()
            profiles = self._gather(values["power_ema"], "the averages of --power-ema")
            copied = _copy(values, self.mesh)
            # a process that has no copy waits for the writers of all, and the others for it
            crowded = any_process(self.accelerator, copied is None)
        elif sharded(self.accelerator):
            copied = values = self._gather(state.state_dict(), "the state")
        elif self.main:
            values = state.state_dict()
            copied = _copy(values)
            crowded = copied is None
        self.saved_at, self.saved_step, self.look_at = time.monotonic(), state.step, 0
        if self.main or self.mesh is not None:
            values = values if copied is None else copied
            profiles = profiles or values.get("power_ema")
            self.writing = self.writer.submit(
                self._write, state.step, values, profiles, state.trouble
            )
        if crowded:
            if not self.crowded:
                self.crowded = True
                self.say("the host has no memory for a copy of the state: training waits for saves")
            self.finish()

    def _gather(self, values: Any, what: str) -> Any:
        """Whole tensors on the main process's host, None for them on the others.

        Raises ValueError on the main process, and ends the others, if it can't hold them.
        """
        error = None
        try:
            if self.main:
                remedy = "its process puts the shards together: give its machine more"
                remedy += "" if self.mesh is not None else ", or pass --save-sharded"
                memory.check(nbytes(values), f"{what} to be saved", remedy)
        except ValueError as caught:
            error = caught
        end_together(self.accelerator, error)
        return gather_to_host(values, self.main)

    def _write(
        self, step: int, values: dict[str, Any], profiles: Any, trouble: int
    ) -> tuple[Path, OSError | None]:
        """The path of the checkpoint, and an error of deleting old ones. profiles: whole."""
        group = None if self.mesh is None else self.mesh.get_group()
        if not self.main:
            return save_checkpoint(self.name, step, values, group), None
        # before the checkpoint: a run that resumes from it has all snapshots up to there
        for width, profile in (profiles or {}).items():
            write_snapshot(
                run_file(self.name, snapshot_suffix(step, width)),
                values["config"],
                profile,
                step=step,
                width=width,
                branch=values["branch"],
            )
        path = save_checkpoint(self.name, step, values, group)
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
            if not self.main:  # the main process knows of all failures, and ends the run
                return
            self.failed = True
            raise
        if self.main:
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


def _copy(values: dict[str, Any], mesh: Any = None) -> dict[str, Any] | None:
    """A copy on the host, of shards as DTensors of that mesh, or None if there is no memory."""
    there = memory.available()
    needed = nbytes(values)
    if mesh is not None:  # all processes of a machine copy at once
        needed = nbytes(map_tensors(local, values)) * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if there is not None and needed > there:
        return None
    try:
        return copy_to_host(values) if mesh is None else copy_to_host_mesh(values, mesh)
    except (MemoryError, RuntimeError) as error:
        if not memory.ran_out(error):
            raise
        return None
