"""The numbers of a run by step: the columns of its CSV, reading them, and NAME_loss.png."""

import csv
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from pathlib import Path

from ..common.files import write_atomically
from ..common.text import need
from . import noise_levels

# The published ones first; fid and kid have a value where the run was evaluated, val_loss where the
# held-out images were looked at.
COLUMNS = [
    *("step", "time", "loss", "fid", "kid"),
    *("epoch", "loss_avg", "lr", "ema_decay", "grad_norm", "gns"),
    *("cmmd", "protocol", "evaluate_n"),
    *("samples", "val_loss", *noise_levels.COLUMNS),
]


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a run's CSV by step, without those that a run which went back has left behind.

    What an evaluation of an earlier checkpoint measured leaves none behind: its row repeats that of
    the step, or has no loss. A row that has no time either says that the run went back to its step.
    Raises ValueError for another program's file.
    """
    rows: list[dict[str, str]] = []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        for column in ("step", "time", "loss"):
            if reader.fieldnames and column not in reader.fieldnames:
                raise ValueError(f"{path} is no run's log: it has no column {column!r}")
        for row in reader:
            if None in row.values():  # cut off where a run was killed
                continue
            if not row["time"]:
                del rows[bisect_right(rows, int(row["step"]), key=_step_of) :]
                continue
            at = bisect_left(rows, int(row["step"]), key=_step_of)
            same = [other for other in rows[at : at + 1] if other["step"] == row["step"]]
            repeated = [(other["time"], other["loss"]) for other in same]
            if not row["loss"] or (row["time"], row["loss"]) in repeated:
                rows[at : at + len(same)] = [row]
            else:
                rows[at:] = [row]
    return rows


def _step_of(row: Mapping[str, str]) -> int:
    return int(row["step"])


def plot_loss(csv_path: Path, path: Path) -> None:
    """The loss and its moving average against the step, from a run's CSV."""
    need("matplotlib", "the loss curve")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in read_rows(csv_path) if row["loss"]]
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
    if min(*loss, *average) > 0:  # a learned weighting adds the logarithm of the uncertainty
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, dpi=120, format="png"))
