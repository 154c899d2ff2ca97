"""Put training runs side by side: a table of where they are, and a page of their curves."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoints import CheckpointError, read_checkpoint
from ..checkpoints.runs import find_checkpoints, find_run
from ..common import options
from ..common.chart import SCRIPT, Line, chart
from ..common.files import writable, write_atomically
from ..common.html import document, escape, table
from ..common.text import aligned
from .curves import read_rows
from .page import PAGE_STYLE, PANELS, Rows, grids, points, split_by_protocol, summary
from .run_files import FACTS

# What curves are drawn against: a column, and the name of the axis.
AXES = {"step": ("step", "step"), "images": ("samples", "images"), "time": ("time", "seconds")}


class Run(NamedTuple):
    """A run of the comparison. settings: its config and what else its numbers depend on, flat."""

    label: str
    name: str
    rows: Rows
    settings: dict[str, Any]
    end_step: int | None


def read_run(path: Path) -> Run:
    """The run whose name, folder or checkpoint `path` is. Raises ValueError where there is none."""
    name = find_run(path, "_metrics.csv")
    if name is None:
        raise ValueError(
            f"{path} is no run: there is no {path.name}_metrics.csv, and none in such a folder; "
            "pass the --name or --output-dir of train.py"
        )
    facts = _facts(name)
    settings = {**facts["run"], **facts["config"]}
    rows = read_rows(Path(f"{name}_metrics.csv"))
    return Run(str(path), name, rows, flat(settings), facts.get("end_step"))


def _facts(name: str) -> dict[str, Any]:
    """The config of a run and what else its numbers depend on, from NAME_run.json or a checkpoint.

    Both are empty where it has neither.
    """
    path = Path(f"{name}_{FACTS}")
    try:
        if path.exists():
            facts = json.loads(path.read_text())
            return {"config": facts["config"], "run": facts["run"], "end_step": facts["end_step"]}
        for checkpoint in find_checkpoints(name)[:1]:
            state = read_checkpoint(checkpoint, only=())
            return {"config": state["config"], "run": state.get("run") or {}}
    except (CheckpointError, ValueError, KeyError) as error:
        print(f"the config of {name} can't be read ({error}); it is left out")
    return {"config": {}, "run": {}}


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """A nest of dicts as one, whose keys are paths."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping) and value
        out |= flat(value, f"{before}{key}.") if inner else {f"{before}{key}": value}
    return out


def differences(runs: Sequence[Run]) -> list[list[str]]:
    """[key, value of each run] for every setting that isn't the same in all."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = []
    for key in keys:
        texts = [json.dumps(run.settings[key]) if key in run.settings else "" for run in runs]
        if len(set(texts)) > 1:
            rows.append([key, *texts])
    return rows


def summaries(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """A table of where the runs are: its heads, and a row for each."""
    found = [summary(run.rows, run.end_step) for run in runs]
    keys = list(dict.fromkeys(key for numbers in found for key in numbers))
    lines = [[run.label, *(n.get(key, "") for key in keys)] for run, n in zip(runs, found)]
    return ["run", *keys], lines


def overlaid(runs: Sequence[Run], by: str) -> str:
    """A chart for each column that there are values of, with a line for each run."""
    x, x_label = AXES[by]
    out = []
    for panel in PANELS:
        for column, label in panel.columns.items():
            if column == "loss":  # its moving average is there
                continue
            lines: dict[str, list[Line]] = {}
            for i, run in enumerate(runs):
                for title, rows in split_by_protocol(panel, run.rows):
                    line = Line(run.label, *points(rows, column, x, panel.means), hue=_hue(i))
                    lines.setdefault(title, []).append(line)
            for title, own in lines.items():
                full = f"{title}: {label}" if len(panel.columns) > 1 else title
                out.append(chart(full, own, panel.log, x_label))
    return f'<div class="charts">{"".join(out)}</div>'


def _hue(i: int) -> float:
    """Hues of any number of runs, each far from those before: steps of the golden angle."""
    return (212 + 137.508 * i) % 360


def to_html(runs: Sequence[Run], by: str) -> str:
    """The page: summaries, what differs, curves, and the latest grid of each."""
    heads, lines = summaries(runs)
    differing = differences(runs)
    labels = [run.label for run in runs]
    pictures = [
        f"<figure>{picture}<figcaption>{escape(run.label)}</figcaption></figure>"
        for run in runs
        for picture in grids(run.name, 1)
    ]
    parts = [
        table(heads, lines),
        "<h2>What differs</h2>",
        table(["setting", *labels], differing, keys=1 + len(runs))
        if differing
        else "<p>nothing</p>",
        f"<h2>Curves by {by}</h2>",
        overlaid(runs, by),
        "<h2>Latest samples</h2>" if pictures else "",
        *pictures,
    ]
    return document(", ".join(labels), parts, PAGE_STYLE, SCRIPT)


def _parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="python -m k_diffusion.training.compare",
        description=__doc__,
        formatter_class=options.HelpFormatter,
    )
    text = "a run's --name, its --output-dir, or one of its checkpoints"
    p.add_argument("runs", type=options.path, nargs="+", metavar="RUN", help=text)
    p.add_argument("--by", choices=list(AXES), default="step", help="what curves are drawn against")
    p.add_argument(
        *("--output", "-o"),
        type=options.path,
        default=Path("compare.html"),
        metavar="FILE",
        help="the page to write",
    )
    return p.parse_args()


@options.friendly_errors
def main() -> None:
    args = _parse_args()
    if args.output.suffix != ".html":
        raise options.UsageError(f"--output must end in .html, got {args.output}")
    runs = [read_run(path) for path in args.runs]
    heads, lines = summaries(runs)
    print("\n".join(aligned([heads, *lines])))
    if differing := differences(runs):
        print("\n" + "\n".join(aligned([["setting", *(run.label for run in runs)], *differing])))
    page = to_html(runs, args.by).encode()
    write_atomically(writable(args.output), lambda file: file.write(page))
    print(f"\nwrote {args.output}")


if __name__ == "__main__":
    main()
