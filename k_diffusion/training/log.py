"""What a run says: progress bar, console, CSV, loss curve, and Accelerate's trackers."""

import math
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .. import utils
from .state import TrainState

COLUMNS = ["step", "epoch", "time", "loss", "loss_avg", "lr", "ema_decay", "grad_norm"]


class NonFiniteLoss(FloatingPointError):
    """The loss became NaN or infinite: the weights of that moment are not worth saving."""


class Log:
    """Collects losses on the device, and every `every` steps reads, averages and writes them.

    Writes NAME_metrics.csv and NAME_loss.png, and to the accelerator's trackers. All processes make
    the same calls; the main one writes.
    """

    def __init__(
        self, accelerator: Any, name: str, state: TrainState, end_step: int | None, every: int = 25
    ):
        self.accelerator, self.name, self.every = accelerator, name, every
        self.losses: list[torch.Tensor] = []
        self.skipped: set[str] = set()
        self.started = time.monotonic() - state.elapsed
        main = accelerator.is_main_process
        self.csv = utils.CSVLogger(f"{name}_metrics.csv", COLUMNS) if main else None
        self.bar = tqdm(
            total=end_step, initial=state.step, unit="step", disable=not main, dynamic_ncols=True
        )

    def say(self, text: str) -> None:
        """Print a line above the progress bar, on the main process."""
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def skip(self, batch: dict[str, Any]) -> None:
        """Report a batch's corrupt images, each file once."""
        for path in "\n".join(batch["skipped"]).split("\n"):
            if path and path not in self.skipped:
                self.skipped.add(path)
                tqdm.write(f"skipped a corrupt image ({len(self.skipped)} so far): {path}")

    def step(self, state: TrainState, loss: torch.Tensor, norm: torch.Tensor | None) -> None:
        """Take in one step. Raises NonFiniteLoss at the next reading after the loss is lost."""
        self.losses.append(loss)
        state.elapsed = time.monotonic() - self.started
        self.bar.update()
        if state.step % self.every == 0:
            self.flush(state, norm)

    def flush(self, state: TrainState, norm: torch.Tensor | None = None) -> None:
        """Read and write the losses collected so far."""
        if not self.losses:
            return
        losses, self.losses = torch.stack(self.losses).float(), []
        loss = self.accelerator.reduce(losses.mean(), reduction="mean").item()
        if not math.isfinite(loss):
            raise NonFiniteLoss(
                f"the loss is {loss} at step {state.step}; try a lower --lr or another "
                "--mixed-precision, and resume from the last checkpoint"
            )
        utils.ema_update_dict(state.ema_stats, {"loss": loss}, 0.98 ** len(losses))
        row = {
            "step": state.step,
            "epoch": state.epoch,
            "time": round(state.elapsed, 3),
            "loss": loss,
            "loss_avg": state.ema_stats["loss"],
            "lr": state.sched.get_last_lr()[0],
            "ema_decay": state.ema_sched.get_value(),
            "grad_norm": "" if norm is None else float(norm),
        }
        self.bar.set_postfix(epoch=state.epoch, loss=f"{state.ema_stats['loss']:.4g}")
        if self.csv is not None:
            self.csv.write(*row.values())
        self.accelerator.log({k: v for k, v in row.items() if k != "step" and v != ""}, state.step)

    def image(self, path: Path | None, step: int) -> None:
        """Send a demo grid to the trackers that take pictures, and redraw the loss curve."""
        if path is None:
            return
        for tracker in self.accelerator.trackers:
            if tracker.name == "wandb":
                import wandb

                tracker.log({"demo_grid": wandb.Image(str(path))}, step=step)
            elif tracker.name == "tensorboard":
                import numpy as np
                from PIL import Image

                picture = np.asarray(Image.open(path).convert("RGB"))[None]
                tracker.log_images({"demo_grid": picture}, step=step, dataformats="NHWC")
        self.plot()

    def plot(self) -> None:
        """Draw NAME_loss.png from the CSV."""
        if self.csv is None:
            return
        try:
            plot_loss(self.csv.filename, Path(f"{self.name}_loss.png"))
        except ImportError as error:
            warnings.warn(f"no loss curve: {error}", stacklevel=2)

    def close(self) -> None:
        self.bar.close()
        self.accelerator.end_training()


def plot_loss(csv_path: Path, path: Path) -> None:
    """The loss and its moving average against the step, from a run's CSV."""
    import csv

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with csv_path.open(newline="") as file:
        # a resumed run may write a step again: its last row counts
        rows = {int(row["step"]): row for row in csv.DictReader(file) if row["loss_avg"]}
    if not rows:
        return
    steps = sorted(rows)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    loss = [float(rows[s]["loss"]) for s in steps]
    axes.plot(steps, loss, color="tab:blue", alpha=0.35, label="loss")
    average = [float(rows[s]["loss_avg"]) for s in steps]
    axes.plot(steps, average, color="tab:blue", label="moving average")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    figure.savefig(path, dpi=120)
