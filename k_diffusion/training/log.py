"""What a run says: progress bar, console, CSV, loss curve, and Accelerate's trackers."""

import csv
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from ..common.files import CSVLogger, write_atomically
from ..common.text import need
from .ema import ema_update_dict
from .state import TrainState

COLUMNS = ["step", "epoch", "time", "loss", "loss_avg", "lr", "ema_decay", "grad_norm", "gns"]
_AVERAGE_DECAY = 0.98


class Progress(NamedTuple):
    """How far a run is: the time in seconds, steps done, images seen."""

    time: float
    step: int
    samples: int

    def since(self, before: "Progress", end_step: int | None) -> str:
        """Images a second since another moment, and at that rate the time that is left."""
        seconds = max(self.time - before.time, 1e-9)
        rate = f"{(self.samples - before.samples) / seconds:.3g} images/s"
        if end_step is None or self.step == before.step:
            return rate
        left = (end_step - self.step) * seconds / (self.step - before.step)
        return f"{rate}, {tqdm.format_interval(left)} left"


class NonFiniteLoss(FloatingPointError):
    """The loss became NaN or infinite: the weights of that moment are not worth saving."""


class Log:
    """Collects losses on the device, and every `every` steps reads, averages and writes them.

    Writes NAME_metrics.csv and NAME_loss.png, and to the accelerator's trackers. All processes make
    the same calls; the main one writes. What can't be written, to a full disk or a tracker that
    fails, is said once and ends no run; rows of the CSV are kept until they can be.
    """

    def __init__(
        self, accelerator: Any, name: str, state: TrainState, end_step: int | None, every: int = 25
    ):
        self.accelerator, self.name, self.every = accelerator, name, every
        self.pending: list[torch.Tensor] = []
        self.norm: torch.Tensor | None = None
        self.skipped: set[str] = set()
        self.said = False  # a line of the loss
        self.end_step = end_step
        now = time.monotonic()
        self.started = now - state.elapsed
        self.last = Progress(now, state.step, state.samples)
        self.failed: set[str] = set()  # what was said to
        main = accelerator.is_main_process
        self.csv_path = Path(f"{name}_metrics.csv")
        self.csv: CSVLogger | None = None  # from the first row on
        self.rows: list[list[Any]] = []  # of the CSV, not yet written
        # a file gets a line every `every` steps instead of a bar
        self.bar = tqdm(
            total=end_step,
            initial=state.step,
            unit="step",
            dynamic_ncols=True,
            disable=None if main else True,
        )

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

    def skip(self, batch: dict[str, Any]) -> None:
        """Report a batch's corrupt images, each file once."""
        for path in "\n".join(batch["skipped"]).split("\n"):
            if path and path not in self.skipped:
                self.skipped.add(path)
                tqdm.write(f"skipped a corrupt image ({len(self.skipped)} so far): {path}")

    def step(self, state: TrainState, loss: torch.Tensor, norm: torch.Tensor | None) -> None:
        """Take in one step. loss, norm: () tensors."""
        self.pending.append(loss)
        self.norm = norm
        state.elapsed = time.monotonic() - self.started
        self.bar.update()
        if state.step % self.every == 0:
            self.write(state)
        elif not self.said:  # that it runs is known after one step, not after `every`
            self.read(state)
            self.show(state, state.losses[-1])

    def read(self, state: TrainState, together: bool = True) -> None:
        """Bring the losses from the device into the state.

        together: averaged over all processes, which must all call this. Raises NonFiniteLoss if a
        loss, or the last gradient, was NaN or infinite.
        """
        if not self.pending:
            return
        losses, self.pending = torch.stack(self.pending).float(), []
        if together:
            losses = self.accelerator.reduce(losses, reduction="mean")
        # in fp16 gradients do overflow, and the step is skipped
        if self.norm is not None and state.scaler is None:
            losses[-1] += 0 * self.norm
        for loss in losses.tolist():
            if not math.isfinite(loss):
                raise NonFiniteLoss(
                    f"the loss or its gradient is NaN or infinite, by step {state.step}; resume "
                    "from the last checkpoint with a lower --lr, or another --mixed-precision"
                )
            state.losses.append(loss)
            ema_update_dict(state.ema_stats, {"loss": loss}, _AVERAGE_DECAY)
        if state.noise_scale is not None:
            state.noise_scale.read(self.accelerator, together)

    def write(self, state: TrainState) -> None:
        """Write a row: the mean loss since the last one, its moving average, and where we are."""
        self.read(state)
        if not state.losses:
            return
        loss, state.losses = math.fsum(state.losses) / len(state.losses), []
        row = {
            "step": state.step,
            "epoch": state.epoch,
            "time": round(state.elapsed, 3),
            "loss": loss,
            "loss_avg": state.ema_stats["loss"],
            "lr": state.sched.get_last_lr()[0],
            "ema_decay": state.ema_sched.get_value(),
            "grad_norm": "" if self.norm is None else float(self.norm),
            "gns": "" if state.noise_scale is None else state.noise_scale.estimate.get_gns(),
        }
        if self.accelerator.is_main_process:
            self.rows.append(list(row.values()))
            self.attempt(str(self.csv_path), self.write_rows)
        numbers = {k: v for k, v in row.items() if k != "step" and v != ""}
        for tracker in self.accelerator.trackers:
            self.attempt(tracker.name, partial(tracker.log, numbers, step=state.step))
        self.show(state, loss)

    def show(self, state: TrainState, loss: float) -> None:
        """Show the progress in the bar, or as a line where there's no terminal."""
        now = Progress(self.started + state.elapsed, state.step, state.samples)
        speed = now.since(self.last, self.end_step)
        self.last, self.said = now, True
        average = f"{state.ema_stats['loss']:.4g}"
        gns = state.noise_scale and f"{state.noise_scale.estimate.get_gns():.4g}"
        shown = {"epoch": state.epoch, "loss": average, **({"gns": gns} if gns else {})}
        self.bar.set_postfix(**shown, speed=speed.split(",")[0])
        if self.bar.disable:
            self.say(
                f"step {state.step}, epoch {state.epoch}, {state.elapsed:.0f} s, {speed}: loss "
                f"{loss:.4g}, on average {average}" + (f", noise scale {gns}" if gns else "")
            )

    def image(self, path: Path | None, step: int) -> None:
        """Send a demo grid to the trackers that take pictures, and redraw the loss curve."""
        if path is None:
            return
        self.say(f"wrote {path}")
        for tracker in self.accelerator.trackers:
            self.attempt(tracker.name, partial(send_image, tracker, path, step))
        self.plot()

    def plot(self) -> None:
        """Draw NAME_loss.png from the CSV."""
        if self.csv is not None:
            path = Path(f"{self.name}_loss.png")
            self.attempt(str(path), partial(plot_loss, self.csv_path, path))

    def close(self) -> None:
        self.bar.close()
        if self.rows:
            self.say(
                f"{self.csv_path} lacks its last {len(self.rows)} rows, which were not written"
            )
        for tracker in self.accelerator.trackers:
            self.attempt(tracker.name, tracker.finish)
        self.accelerator.trackers = []
        self.accelerator.end_training()


def send_image(tracker: Any, path: Path, step: int) -> None:
    """Send a demo grid to a tracker, if it takes pictures."""
    if tracker.name == "wandb":
        import wandb

        tracker.log({"demo_grid": wandb.Image(str(path))}, step=step)
    elif tracker.name == "tensorboard":
        import numpy as np
        from PIL import Image

        picture = np.asarray(Image.open(path).convert("RGB"))[None]
        tracker.log_images({"demo_grid": picture}, step=step, dataformats="NHWC")


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a run's CSV by step; where a resumed run wrote a step again, its last row."""
    with path.open(newline="") as file:
        # a row may be cut off where a run was killed
        rows = [row for row in csv.DictReader(file) if None not in row.values()]
    return [row for _, row in sorted({int(row["step"]): row for row in rows}.items())]


def plot_loss(csv_path: Path, path: Path) -> None:
    """The loss and its moving average against the step, from a run's CSV."""
    need("matplotlib", "the loss curve")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_rows(csv_path)
    if not rows:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [int(row["step"]) for row in rows]
    loss = [float(row["loss"]) for row in rows]
    average = [float(row["loss_avg"]) for row in rows]
    axes.plot(steps, loss, color="tab:blue", alpha=0.35, label="loss")
    axes.plot(steps, average, color="tab:blue", label="moving average")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, dpi=120, format="png"))
