"""The page of a run with a folder of its own: index.html, of curves, demo grids and facts."""

import argparse
import glob
import io
import json
import math
import platform
import shlex
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from tqdm.auto import tqdm

from ..common import memory
from ..common.chart import SCRIPT, STYLE, Line, chart, number
from ..common.files import writable, write_atomically
from ..common.html import document, escape, image, table
from ..common.modules import n_params
from . import noise_levels
from .curves import read_rows
from .run_files import FACTS, PAGE
from .state import TrainState

_GRIDS = 24  # the latest ones
_SIDE = 1024  # pixels, of a grid on the page
_SECONDS = 60.0  # between two updates, and at least so many times what the last one took
_PATIENCE = 100.0

Rows = Sequence[Mapping[str, str]]
RATE = "images_per_second"  # not a column, but follows from two rows


class Panel(NamedTuple):
    """A chart of some columns, by their curves' labels. means: smoothed, as they are noisy."""

    title: str
    columns: Mapping[str, str]
    log: bool = True
    means: bool = False


PANELS = (
    Panel("Loss", {"loss": "rows", "loss_avg": "moving average", "val_loss": "held-out images"}),
    Panel(
        "Loss by noise level sigma",
        dict(zip(noise_levels.COLUMNS, noise_levels.RANGES)),
        means=True,
    ),
    Panel("Gradient norm, before clipping", {"grad_norm": "last step of each row"}),
    Panel("Gradient noise scale, in images", {"gns": "estimate"}),
    Panel("FD", {"fid": "averaged weights"}),
    Panel("KID", {"kid": "averaged weights"}),
    Panel("CMMD", {"cmmd": "averaged weights"}),
    Panel("Images per second", {RATE: "with all that a run does"}, log=False, means=True),
    Panel("Learning rate", {"lr": "first group"}, log=False),
)
_METRICS = ("fid", "kid", "cmmd")


# ------------------------------------------------------------------------------ what is written


def facts_of(args: argparse.Namespace, accelerator: Any, state: TrainState) -> dict[str, Any]:
    """What a page says of a run besides its numbers: NAME_run.json."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "name": Path(args.name).name,
        "end_step": args.end_step,
        "command": shlex.join(["python", *resuming(sys.argv)]),
        "working directory": str(Path.cwd()),
        "parameters": n_params(state.model),
        "run": {**state.run, "seed": state.seed},
        "machine": {
            "host": socket.gethostname(),
            "device": f"{device} {name}".strip(),
            "cores": memory.cores(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "config": state.config,
    }


def resuming(words: Sequence[str]) -> list[str]:
    """The command that goes on with the run that `words` have started.

    Without the flags that would go back to a file, average anew, or only evaluate.
    """
    kept, left = [], iter(words)
    for word in left:
        # argparse takes any beginning that is of one flag only
        if word.startswith("--resum"):
            if "=" not in word:
                next(left, None)  # its file
        elif not word.startswith(("--rese", "--evaluate-o")):
            kept.append(word)
    return kept


def make_page(args: argparse.Namespace, accelerator: Any, state: TrainState) -> "Page | None":
    """The page of a run with an --output-dir that trains; None for others."""
    # an evaluation writes into the CSV; its command and its end aren't those of the run
    if not args.output_dir or getattr(args, "evaluate_only", False):
        return None
    return Page(args.name, facts_of(args, accelerator, state))


class Page:
    """Writes a run's page while it goes, at most once a minute and in 1% of its time.

    Reads what the run has written, so that a resumed run's page has all of it.
    """

    def __init__(
        self, name: str, facts: Mapping[str, Any], clock: Callable[[], float] = time.monotonic
    ):
        self.name, self.facts, self.clock = name, facts, clock
        self.path = Path(name).with_name(PAGE)
        self.due = -math.inf
        self.written = False

    def update(self, status: str = "running") -> None:
        """Write the page, if that is due, or the run has ended and there is one. Raises OSError."""
        begin = self.clock()
        if begin < self.due if status == "running" else not self.written:
            return
        if not self.written:
            text = json.dumps(self.facts, indent=1, default=str)
            path = writable(Path(f"{self.name}_{FACTS}"))
            write_atomically(path, lambda file: file.write(text.encode()))
            self.written = True
        page = render(self.name, self.facts, status)
        write_atomically(self.path, lambda file: file.write(page.encode()))
        end = self.clock()
        self.due = end + max(_SECONDS, _PATIENCE * (end - begin))


# ------------------------------------------------------------------------------------- curves


def points(
    rows: Rows, column: str, x: str = "step", means: bool = False
) -> tuple[list[float], list[float]]:
    """The values of a column, where there are any, against another one. means: of 100 parts."""
    if column == RATE:
        found = [
            (float(b[x]), (int(b["samples"]) - int(a["samples"])) / seconds)
            for a, b in pairwise(rows)
            if a.get("samples") and (seconds := float(b["time"]) - float(a["time"])) > 0
        ]
    else:
        found = [(float(r[x]), float(r[column])) for r in rows if r.get(column) and r.get(x)]
    found = [point for point in found if all(map(math.isfinite, point))]
    if means and len(found) > 200:
        bounds = [i * len(found) // 100 for i in range(101)]
        parts = [found[a:b] for a, b in pairwise(bounds)]
        found = [
            (sum(p[0] for p in part) / len(part), sum(p[1] for p in part) / len(part))
            for part in parts
        ]
    return [x for x, _ in found], [y for _, y in found]


def split_by_protocol(panel: Panel, rows: Rows) -> list[tuple[str, Rows]]:
    """(title, rows) of each protocol that a metric was measured by; of other panels, all rows.

    The published columns have no protocol: the title is then the panel's alone.
    """
    if not set(panel.columns) & set(_METRICS):
        return [(panel.title, rows)]
    measured = [row for row in rows if any(row.get(column) for column in panel.columns)]
    names = dict.fromkeys(row.get("protocol", "") for row in measured)
    return [
        (
            f"{panel.title} [{name}]" if name else panel.title,
            [row for row in measured if row.get("protocol", "") == name],
        )
        for name in names
    ]


def charts(rows: Rows) -> str:
    """All panels that a run has values for."""
    out = []
    for panel in PANELS:
        many = len(panel.columns) > 3  # in order: by hues from blue to red
        for title, own in split_by_protocol(panel, rows):
            lines = [
                Line(
                    label,
                    *points(own, column, means=panel.means),
                    faint=column == "loss",
                    hue=265 - 250 * i / (len(panel.columns) - 1) if many else None,
                )
                for i, (column, label) in enumerate(panel.columns.items())
            ]
            out.append(chart(title, lines, panel.log))
    return f'<div class="charts">{"".join(out)}</div>'


# --------------------------------------------------------------------------------------- page


PAGE_STYLE = (
    STYLE
    + """
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem;
  padding: 0; list-style: none }
.cards li { background: var(--soft); border-radius: 8px; padding: .5rem .9rem; margin: 0 }
.cards b { display: block; font-size: 1.15rem; font-variant-numeric: tabular-nums }
.grids img { display: none } .grids img.shown { display: block }
.grids img.small { width: 480px } .grids img.large { image-rendering: auto }
.grids label { display: flex; align-items: center; gap: .8rem; margin-bottom: .6rem;
  font-variant-numeric: tabular-nums; white-space: nowrap }
.grids input { flex: 1; max-width: 30rem }
pre.command { white-space: pre-wrap; overflow-wrap: anywhere; margin-top: .2rem }
.facts { display: flex; flex-wrap: wrap; gap: 1rem 3rem; align-items: start }
.facts td { white-space: normal; overflow-wrap: anywhere }
.warning { color: hsl(20 85% var(--tone)) } summary { cursor: pointer }
"""
)

# The chosen grid outlasts the reload of a page whose run goes on.
_PAGE_SCRIPT = (
    SCRIPT
    + """
const slider = document.querySelector('.grids input');
if (slider) {
  const grids = [...document.querySelectorAll('.grids img')];
  const show = () => {
    grids.forEach((grid, i) => grid.classList.toggle('shown', i == slider.value));
    document.querySelector('.grids output').value = grids[slider.value].alt;
  };
  const kept = grids.findIndex(grid => grid.alt == sessionStorage.grid);
  if (kept >= 0) slider.value = kept;
  slider.addEventListener('input', () => {
    show();
    if (slider.value == slider.max) delete sessionStorage.grid;
    else sessionStorage.grid = grids[slider.value].alt;
  });
  show();
}
const updated = document.querySelector('time[data-running]');
if (updated) {
  const minutes = (Date.now() - Date.parse(updated.dateTime)) / 60000;
  if (minutes > 30) document.querySelector('.warning').hidden = false;
  setTimeout(() => location.reload(), 60000);
}
"""
)


def render(name: str, facts: Mapping[str, Any], status: str = "running") -> str:
    """The page of a run, from its CSV, its demo grids and its facts."""
    csv_path = Path(f"{name}_metrics.csv")
    rows = read_rows(csv_path) if csv_path.exists() else []
    running = status == "running"
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    parts = [
        f"<p>{escape(status)}, updated <time datetime={now[:-2]}:{now[-2:]}"
        f"{' data-running' * running}>{now[:10]} {now[11:16]}</time>"
        '<span class="warning" hidden>: half an hour ago or more; the run may be gone</span></p>',
        _cards(rows, facts),
        "<h2>Curves</h2>" if rows else "",
        charts(rows),
        _grids(name),
        "<h2>Go on</h2>",
        _commands(name, facts),
        "<h2>The run</h2>",
        '<div class="facts">',
        table(["run", ""], _pairs({"parameters": facts["parameters"], **facts["run"]}), keys=2),
        table(["machine", ""], _pairs(facts["machine"]), keys=2),
        "</div>",
        "<h2>Config</h2>",
        f"<details><summary>filled in</summary><pre>{_json(facts['config'])}</pre></details>",
    ]
    return document(facts["name"], parts, PAGE_STYLE, _PAGE_SCRIPT)


def _json(value: Any) -> str:
    return escape(json.dumps(value, indent=2, default=str))


def _pairs(values: Mapping[str, Any]) -> list[list[str]]:
    return [
        [key.replace("_", " "), f"{value:,}" if type(value) is int else str(value)]
        for key, value in values.items()
    ]


def summary(rows: Rows, end_step: int | None = None) -> dict[str, str]:
    """A run's numbers in a line: where it is, how fast, and the last of each that it measured."""
    if not rows:
        return {}
    last = rows[-1]
    done = f"{int(last['step']):,}" + (f" of {end_step:,}" if end_step else "")
    out = {"step": done}
    if last.get("samples"):
        out["images"] = number(int(last["samples"]))
    if last.get("epoch"):
        out["epoch"] = last["epoch"]
    out["time"] = tqdm.format_interval(float(last["time"]))
    steps, rates = points(rows, RATE)
    if rates:
        recent = sorted(rates[-9:])[len(rates[-9:]) // 2]
        out["images/s"] = f"{recent:.3g}"
        left = ((end_step or 0) - steps[-1]) * int(last["samples"]) / steps[-1]
        if left > 0:
            out["left"] = tqdm.format_interval(left / recent)
    for column, label in {"loss_avg": "loss", "val_loss": "held-out loss"}.items():
        if values := points(rows, column)[1]:
            out[label] = f"{values[-1]:.4g}"
    for panel in PANELS:
        for title, own in split_by_protocol(panel, rows):
            if own and (column := next(iter(panel.columns))) in _METRICS:
                steps, values = points(own, column)
                best = min(zip(values, steps), default=None)
                if best:
                    out[f"{title}, best"] = f"{best[0]:.4g} at {number(best[1])}"
    return out


def _cards(rows: Rows, facts: Mapping[str, Any]) -> str:
    cards = summary(rows, facts["end_step"])
    items = "".join(f"<li>{escape(key)}<b>{escape(text)}</b></li>" for key, text in cards.items())
    return f'<ul class="cards">{items}</ul>' if items else "<p>no numbers yet</p>"


def _commands(name: str, facts: Mapping[str, Any]) -> str:
    folder = shlex.quote(str(Path(name).parent))
    launcher = "" if facts["run"].get("processes", 1) == 1 else ", by the launcher that started it"
    blocks = {
        f"resume, in {facts['working directory']}{launcher}": facts["command"],
        "sample": f"python sample.py --checkpoint {folder} -n 64 --grid samples.png",
        "in Python": f"model = k_diffusion.load({str(Path(name).parent)!r})",
    }
    return "".join(
        f'{escape(what)}<pre class="command"><code>{escape(command)}</code></pre>'
        for what, command in blocks.items()
    )


def grids(name: str, most: int = _GRIDS) -> list[str]:
    """The latest demo grids of a run as pictures, in their order; the last is marked as shown."""
    base = Path(name)
    paths = sorted(base.parent.glob(f"{glob.escape(base.name)}_demo_*.png"), key=_step)[-most:]
    found = [(path, *_embedded(path, path.stat().st_mtime_ns)) for path in paths]
    marks = [""] * (len(found) - 1) + [" shown"]
    return [
        image(data, f"step {_step(path):,}", f'class="{size}{mark}"', kind)
        for (path, data, kind, size), mark in zip(found, marks)
    ]


def _grids(name: str) -> str:
    pictures = grids(name)
    last = len(pictures) - 1
    if not pictures:
        return ""
    return (
        '<h2>Samples of the averaged weights</h2><div class="grids"><label>'
        f'<input type="range" min="0" max="{last}" value="{last}" aria-label="step">'
        f"<output></output></label>{''.join(pictures)}</div>"
    )


def _step(path: Path) -> int:
    digits = path.stem.rpartition("_")[2]
    return int(digits) if digits.isdecimal() else 0


@lru_cache(_GRIDS)
def _embedded(path: Path, changed: int) -> tuple[bytes, str, str]:
    """A grid for the page: its bytes, their format, and whether it is small or large."""
    with Image.open(path) as grid:
        grid.load()
    if max(grid.size) <= _SIDE:
        return path.read_bytes(), "png", "small" if grid.width < 480 else "large"
    grid.thumbnail((_SIDE, _SIDE))
    out = io.BytesIO()
    grid.convert("RGB").save(out, "jpeg", quality=88)
    return out.getvalue(), "jpeg", "large"
