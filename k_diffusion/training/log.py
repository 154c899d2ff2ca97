"""What a run says: progress bar, console, CSV, loss curve, and Accelerate's trackers."""

import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from tqdm.auto import tqdm

from ..common.files import CSVLogger, writable, write_atomically
from ..distributed import gather_items
from . import run_files
from .curves import COLUMNS, plot_loss, read_rows
from .ema import ema_update_dict
from .page import Page
from .state import TrainState

__all__ = ["COLUMNS", "read_rows"]

_AVERAGE_DECAY = 0.98
_LINE_SECONDS = 60.0


class Progress(NamedTuple):
    """How far a run is: the time in seconds, steps done, images seen, seconds waited for them."""

    time: float
    step: int
    samples: int
    waited: float = 0.0

    def since(self, before: "Progress", end_step: int | None) -> str:
        """Images a second since another moment, the share of the time in which the loop waited for
        data, and at that rate the time that is left."""
        seconds = max(self.time - before.time, 1e-9)
        waited = (self.waited - before.waited) / seconds
        rate = f"{(self.samples - before.samples) / seconds:.3g} images/s"
        rate += f" ({min(waited, 1):.0%} waiting for data)"
        if end_step is None or self.step == before.step:
            return rate
        left = (end_step - self.step) * seconds / (self.step - before.step)
        return f"{rate}, {tqdm.format_interval(left)} left"


class NonFiniteLoss(FloatingPointError):
    """So many steps in a row were skipped that the weights are not worth going on from."""


class Pending(NamedTuple):
    """A step's loss and gradient norm, not yet read from the device, and the items it was of."""

    step: int
    loss: torch.Tensor
    norm: torch.Tensor
    items: list[int]


class Log:
    """Collects losses on the device, and every `every` steps reads, averages and writes them.

    Writes NAME_metrics.csv and NAME_loss.png, the page, and to the accelerator's trackers. All
    processes make the same calls; the main one writes. What can't be written, to a full disk or a
    tracker that fails, is said once and ends no run; rows of the CSV are kept until they can be.
    """

    def __init__(
        self,
        accelerator: Any,
        name: str,
        state: TrainState,
        end_step: int | None,
        every: int = 25,
        max_bad_steps: int = 10,
        page: Page | None = None,
    ):
        self.accelerator, self.name, self.every = accelerator, name, every
        self.page = page if accelerator.is_main_process else None
        self.max_bad_steps, self.bad_steps = max_bad_steps, 0
        self.pending: list[Pending] = []
        self.items: list[int] = []  # of the step under way
        self.norm: torch.Tensor | None = None
        self.skipped: set[str] = set()  # corrupt images, as named
        self.unnamed: list[str] = []  # and of this process, not yet
        self.said = False  # a line of the loss
        self.unsaid = ""  # the latest line, where one was said less than a minute ago
        self.begin, self.end_step = state.step, end_step
        now = time.monotonic()
        self.started = now - state.elapsed
        self.waited = 0.0  # seconds, for data
        self.last = Progress(now, state.step, state.samples)
        self.failed: set[str] = set()  # what was said to
        main = accelerator.is_main_process
        self.csv_path = Path(f"{name}_metrics.csv")
        self.csv: CSVLogger | None = None  # from the first row on
        self.rows: list[list[Any]] = []  # of the CSV, not yet written
        rows = self._rows_in_csv()
        # what the run, before it was resumed, wrote of this step, and of those that it leaves
        known = next((row for row in rows if row["step"] == str(state.step)), {})
        self.last_row: dict[str, Any] = {**known, "step": state.step} if known else {}
        self.left = [step for row in rows if (step := int(row["step"])) > state.step]
        # a file gets a line a minute instead of a bar
        self.bar = tqdm(
            total=end_step,
            initial=state.step,
            unit="step",
            dynamic_ncols=True,
            disable=None if main else True,
        )

    def _rows_in_csv(self) -> list[dict[str, str]]:
        if self.accelerator.is_main_process and self.csv_path.exists():
            with suppress(OSError, ValueError):  # it may be of another program
                return read_rows(self.csv_path)
        return []

    def say(self, text: str) -> None:
        """Print a line above the progress bar, on the main process."""
        if self.accelerator.is_main_process:
            tqdm.write(text)
            sys.stdout.flush()

    def attempt(self, what: str, write: Callable[[], object]) -> bool:
        """Write something the run can do without; its failure is said once. Returns its success."""
        try:
            write()
        except Exception as error:
            if what not in self.failed:
                self.failed.add(what)
                self.say(f"can't write {what} ({type(error).__name__}: {error}); going on")
            return False
        if what in self.failed:
            self.failed.remove(what)
            self.say(f"{what} is written again")
        return True

    def write_rows(self) -> None:
        """Write the rows to the CSV. Raises OSError; the next call then tries again."""
        try:
            if self.csv is None:
                self.csv = CSVLogger(self.csv_path, COLUMNS)
            while self.rows:
                self.csv.write(*self.rows[0])
                del self.rows[0]
        except OSError:
            # opened anew, it begins with a line of its own
            if self.csv is not None:
                with suppress(OSError):
                    self.csv.file.close()
            self.csv = None
            raise

    def skip(self, batch: dict[str, Any], waited: float = 0.0) -> None:
        """Note a batch's corrupt images, and what the step is of.

        Of one process they are named at once; what several have met they share in `read`.
        waited: the seconds that the loop stood still for the batch.
        """
        self.waited += waited
        self.items += batch["index"].tolist()
        found = dict.fromkeys("\n".join(batch["skipped"]).split("\n"))
        self.unnamed += [p for p in found if p and p not in self.skipped and p not in self.unnamed]
        if self.accelerator.num_processes == 1:
            self.name_skipped(self.unnamed)

    def name_skipped(self, paths: list[str]) -> None:
        """Say which images are corrupt, each file once."""
        self.unnamed = []
        for path in paths:
            if path not in self.skipped:
                self.skipped.add(path)
                self.say(f"skipped a corrupt image ({len(self.skipped)} so far): {path}")

    def step(self, state: TrainState, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Take in one step. loss, norm: () tensors."""
        self.pending.append(Pending(state.step, loss, norm, self.items))
        self.norm, self.items = norm, []
        state.elapsed = time.monotonic() - self.started
        self.bar.update()
        if state.step % self.every == 0:
            self.write(state)
        elif not self.said:  # that it runs is known after one step, not after `every`
            self.read(state)
            if state.losses:
                self.show(state, state.losses[-1])

    def read(self, state: TrainState, together: bool = True) -> None:
        """Bring the losses from the device into the state, and tell of skipped steps and images.

        together: averaged over all processes, which must all call this. Raises NonFiniteLoss if too
        many steps in a row were skipped.
        """
        if not self.pending:
            return
        pending, self.pending = self.pending, []
        own = torch.stack([step.loss for step in pending]).float()
        losses = own
        if together:
            # with the losses goes the number of corrupt images: their names are seldom wanted
            both = torch.cat([own, own.new_tensor([len(self.unnamed)])])
            losses, unnamed = self.accelerator.reduce(both, reduction="mean").split([len(own), 1])
            if unnamed > 0:
                self.name_skipped(gather_items(self.unnamed))
        elif self.unnamed:
            self.name_skipped(self.unnamed)
        norms = torch.stack([step.norm for step in pending]).float()
        scale = None if state.scaler is None else state.scaler.get_scale()
        well = [i for i, norm in enumerate(norms.tolist()) if math.isfinite(norm)]
        rows = zip(pending, own.tolist(), losses.tolist(), norms.tolist())
        for i, (step, mine, loss, norm) in enumerate(rows):
            # fp16 looks for the largest scale at which gradients don't overflow: a later step that
            # goes well has found it, and each that doesn't halves it
            searching = False
            if scale is not None and math.isfinite(loss):
                halved = len(pending) - i
                searching = i < max(well, default=-1) or scale * 2.0 ** min(halved, 99) > 1
            if math.isfinite(loss + norm) or searching:
                if math.isfinite(norm):
                    state.bad_steps = 0
                state.losses.append(loss)
                ema_update_dict(state.ema_stats, {"loss": loss}, _AVERAGE_DECAY)
                continue
            state.skipped(step.step)
            self.bad_steps += 1
            if not math.isfinite(mine) or math.isfinite(loss):  # else it was another process
                what = "gradient" if math.isfinite(mine) else "loss"
                tqdm.write(
                    f"skipped step {step.step} ({self.bad_steps} so far), whose {what} is NaN or "
                    f"infinite; its items: {', '.join(map(str, step.items))}"
                )
            if state.bad_steps >= self.max_bad_steps:
                raise NonFiniteLoss(self._lost(state, scale))
        state.levels.read(self.accelerator, together)
        if state.noise_scale is not None:
            state.noise_scale.read(self.accelerator, together)

    def _lost(self, state: TrainState, scale: float | None) -> str:
        """What to do when steps are skipped time and again."""
        what = f"{state.bad_steps} steps in a row, up to step {state.bad_at}, were skipped"
        why = "as their loss or gradient is NaN or infinite"
        other = "a lower --lr, or another --mixed-precision"
        if scale is not None:
            why = f"as fp16 overflows in every step, even at a loss scale of {scale:g}"
            other = "--mixed-precision bf16, or a lower --lr"
        path = run_files.before(self.name, state.trouble)
        start = (
            f"resume with --resume {path}, from before the trouble began, and"
            if path
            else "start with"
        )
        return f"{what}, {why}; {start} {other}"

    def write(self, state: TrainState) -> None:
        """Write a row: the mean loss since the last one, its moving average, and where we are."""
        self.read(state)
        # none where all were skipped; those from before this run wait for its first step
        if not state.losses or state.step == self.begin:
            return
        loss, state.losses = math.fsum(state.losses) / len(state.losses), []
        row = self._row(state, loss)
        self.write_row(row)
        self.track({k: v for k, v in row.items() if k != "step" and v != ""}, state.step)
        self.show(state, loss)

    def _row(self, state: TrainState, loss: float | str) -> dict[str, Any]:
        """Where a run is, by COLUMNS, without what is measured. loss: "" where there is none."""
        return {
            "step": state.step,
            "time": round(state.elapsed, 3),
            "loss": loss,
            "epoch": state.epoch,
            "loss_avg": state.ema_stats.get("loss", ""),
            "lr": state.sched.get_last_lr()[0],
            "ema_decay": state.ema_sched.get_value(),
            "grad_norm": "" if self.norm is None else float(self.norm),
            "gns": "" if state.noise_scale is None else state.noise_scale.estimate.get_gns(),
            "samples": state.samples,
            **state.levels.take(),
        }

    def write_row(self, row: dict[str, Any]) -> None:
        """Append a row to the CSV, on the main process. row: by COLUMNS, which may lack some."""
        self.last_row = row
        if row["step"] > self.begin:
            # those that the rows to come don't replace
            if any(step < row["step"] for step in self.left):
                self.rows.append([self.begin, *[""] * (len(COLUMNS) - 1)])
            self.left = []
        if self.accelerator.is_main_process:
            self.rows.append([row.get(column, "") for column in COLUMNS])
            self.attempt(str(self.csv_path), self.write_rows)
            self.update_page()

    def update_page(self, status: str = "running") -> None:
        """Bring the run's page up to date, if it has one."""
        if self.page is not None:
            self.attempt(str(self.page.path), partial(self.page.update, status))

    def track(self, numbers: dict[str, Any], step: int) -> None:
        """Send numbers to the trackers."""
        for tracker in self.accelerator.trackers:
            self.attempt(tracker.name, partial(tracker.log, numbers, step=step))

    def evaluated(self, state: TrainState, metrics: dict[str, Any]) -> None:
        """Write what was measured, `fid` or `val_loss` among COLUMNS, into the step's row.

        One without a loss, where no step was taken since the run was resumed, or all were skipped.
        """
        self.write(state)
        if not metrics:
            return
        known = self.last_row.get("step") == state.step
        row = self.last_row if known else self._row(state, "")
        if "protocol" in metrics:  # a row has one: what was measured by another isn't of it
            row = {**row, "fid": "", "kid": "", "cmmd": ""}
        self.write_row({**row, **metrics})
        by = f"[{metrics['protocol']}]" if "protocol" in metrics else ""
        numbers = {f"{k}{by}": v for k, v in metrics.items() if isinstance(v, float)}
        self.track(numbers, state.step)

    def show(self, state: TrainState, loss: float) -> None:
        """Show the progress in the bar, or as a line where there's no terminal."""
        now = Progress(self.started + state.elapsed, state.step, state.samples, self.waited)
        speed = now.since(self.last, self.end_step)
        due = not (self.bar.disable and self.said and now.time < self.last.time + _LINE_SECONDS)
        if due:
            self.last, self.said = now, True
        average = f"{state.ema_stats['loss']:.4g}"
        gns = state.noise_scale and f"{state.noise_scale.estimate.get_gns():.4g}"
        shown = {"epoch": state.epoch, "loss": average, **({"gns": gns} if gns else {})}
        self.bar.set_postfix(**shown, speed=speed.split(",")[0])
        if self.bar.disable:
            line = (
                f"step {state.step}, epoch {state.epoch}, {state.elapsed:.0f} s, {speed}: loss "
                f"{loss:.4g}, on average {average}" + (f", noise scale {gns}" if gns else "")
            )
            self.unsaid = "" if due or state.step == self.last.step else line
            if due:
                self.say(line)

    def image(self, grid: Image.Image | None, step: int) -> None:
        """Write a demo grid, send it to trackers that take pictures, and redraw the loss curve."""
        if grid is None:
            return
        path = Path(f"{self.name}_demo_{step:08}.png")
        if self.attempt("the demo grid", partial(write_image, grid, path)):
            self.say(f"wrote {path}")
        for tracker in self.accelerator.trackers:
            self.attempt(tracker.name, partial(send_image, tracker, grid, step))
        self.plot()

    def plot(self) -> None:
        """Draw NAME_loss.png from the CSV."""
        if self.csv is not None:
            path = Path(f"{self.name}_loss.png")
            self.attempt(str(path), partial(plot_loss, self.csv_path, path))

    def close(self, status: str = "finished") -> None:
        """Say what is left to say, and end the page and the trackers. status: how the run ended."""
        self.bar.close()
        if self.unsaid:
            self.say(self.unsaid)
        self.update_page(status)
        if self.rows:
            self.say(
                f"{self.csv_path} lacks its last {len(self.rows)} rows, which were not written"
            )
        for tracker in self.accelerator.trackers:
            self.attempt(tracker.name, tracker.finish)
        self.accelerator.trackers = []
        self.accelerator.end_training()


def write_image(grid: Image.Image, path: Path) -> None:
    """Write a demo grid as PNG."""
    write_atomically(writable(path), lambda file: grid.save(file, format="png"))


def send_image(tracker: Any, grid: Image.Image, step: int) -> None:
    """Send a demo grid to a tracker, if it takes pictures."""
    if tracker.name == "wandb":
        import wandb

        tracker.log({"demo_grid": wandb.Image(grid)}, step=step)
    elif tracker.name == "tensorboard":
        import numpy as np

        picture = np.asarray(grid.convert("RGB"))[None]
        tracker.log_images({"demo_grid": picture}, step=step, dataformats="NHWC")
