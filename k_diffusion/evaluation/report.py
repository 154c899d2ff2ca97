"""Results of an evaluation as files: CSV, JSON, a plot, and one self-contained page."""

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.files import write_atomically
from ..common.html import document, escape, image as image_of, table
from ..common.text import need
from .registry import METRICS

FIGURES = ("value", "error", "low", "high")
_FIRST = ("metric", "protocol", *FIGURES, "n", "n_reference")

Row = dict[str, Any]


def read_results(folder: Path) -> list[Row]:
    """The rows of a folder's results.json, [] where there is none.

    Raises ValueError if they are damaged, or the folder has another page than theirs.
    """
    path = folder / "results.json"
    if (folder / "index.html").exists() and not path.exists():
        raise ValueError(
            f"{folder} holds an index.html of something else, a training run perhaps; name another "
            "folder"
        )
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} can't be read: {error}; delete it, or name another folder"
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} isn't a list of results; name another folder")
    return rows


def write_results(folder: Path, rows: Sequence[Row], title: str) -> None:
    """Write results.csv, results.json, index.html and, of a sweep, sweep.png.

    rows: each with metric, protocol, value, error, low, high, n, n_reference, line and settings,
    and maybe `grid`, the name of a picture in the folder. A file is there whole or not at all.
    """
    text = json.dumps(list(rows), indent=1, allow_nan=False)
    write_atomically(folder / "results.json", lambda file: file.write(text.encode()))
    table = to_csv(rows)
    write_atomically(folder / "results.csv", lambda file: file.write(table.encode()))
    picture = plot(rows)
    if picture:
        write_atomically(folder / "sweep.png", lambda file: file.write(picture))
    page = to_html(rows, title, folder, picture)
    write_atomically(folder / "index.html", lambda file: file.write(page.encode()))


def clean(value: float) -> float | None:
    """A number for JSON, which has no NaN."""
    return value if math.isfinite(value) else None


def to_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV: metric, numbers, then a column for each setting."""
    keys = _setting_keys(rows)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*_FIRST, *keys])
    for row in rows:
        settings = row["settings"]
        cells = [*(row.get(key) for key in _FIRST), *(settings.get(key) for key in keys)]
        writer.writerow(["" if cell is None else _shown(cell) for cell in cells])
    return out.getvalue()


def _setting_keys(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row["settings"]))


_FILES = frozenset({"checkpoint", "samples", "autoguidance"})


def _shown(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _short(key: str, value: Any) -> str:
    return Path(str(value)).name if key in _FILES else str(_shown(value))


def settings_of(row: Row) -> dict[str, Any]:
    """What a row's number depends on, n among it."""
    return {**row["settings"], "n": row["n"]}


def swept(rows: Sequence[Row]) -> list[str]:
    """The settings that differ between rows."""
    keys = [*_setting_keys(rows), "n"]
    seen = {key: {json.dumps(settings_of(row).get(key)) for row in rows} for key in keys}
    return [key for key, values in seen.items() if len(values) > 1 and key != "checkpoint_sha256"]


def columns(rows: Sequence[Row]) -> tuple[list[str], list[tuple[list[str], list[str]]]]:
    """A table, one row for each setting: its heads, and (settings, numbers) as texts."""
    keys = swept(rows)
    names = list(dict.fromkeys(name_of(row) for row in rows))
    table: dict[str, tuple[list[str], dict[str, str]]] = {}
    for row in rows:
        settings = settings_of(row)
        of = [_short(key, settings.get(key, "")) for key in keys]
        cells = table.setdefault(json.dumps(settings, sort_keys=True), (of, {}))[1]
        cells[name_of(row)] = number(row)
    lines = [(of, [cells.get(name, "") for name in names]) for of, cells in table.values()]
    return [*keys, *names], lines


def name_of(row: Row) -> str:
    """`FD[lite0]`, or the metric alone where it has no protocol."""
    return row["metric"] + (f"[{row['protocol']}]" if row.get("protocol") else "")


def number(row: Row) -> str:
    """The value with its standard error."""
    if row.get("error") is None:
        return f"{row['value']:.4g}"
    if not row["error"]:
        return f"{row['value']:.4g} ± 0"
    places = min(8, max(0, -math.floor(math.log10(row["error"]))))
    return f"{row['value']:.{places}f} ± {row['error']:.{places}f}"


def better(row: Row) -> str:
    """Whether lower or higher is better, as an arrow."""
    name = row.get("key", "")
    lower = METRICS[name].lower if name in METRICS else name == "bits_per_dim"
    return "↓" if lower else "↑"


# ------------------------------------------------------------------------------------ the plot


def plot(rows: Sequence[Row]) -> bytes | None:
    """A sweep's metrics against its numeric setting with most values, as PNG; None without one."""
    samples = [row for row in rows if row["key"] != "bits_per_dim"]  # that has fewer settings
    keys = swept(samples)
    axes_of: dict[str, set[Any]] = {
        key: {settings_of(row).get(key) for row in samples}
        for key in keys
        if all(isinstance(settings_of(row).get(key), (int, float)) for row in samples)
    }
    if not axes_of:
        return None
    x = max(axes_of, key=lambda key: len(axes_of[key]))
    try:
        need("matplotlib", "the plot of a sweep")
    except ImportError:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if x in settings_of(row)]
    names = list(dict.fromkeys(name_of(row) for row in rows))
    width = min(3, len(names))
    height = math.ceil(len(names) / width)
    figure = Figure(figsize=(4.4 * width, 3.3 * height), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    others = [key for key in keys if key != x]
    for i, name in enumerate(names):
        axes = figure.add_subplot(height, width, i + 1)
        lines: dict[str, list[Row]] = {}
        for row in rows:
            if name_of(row) == name:
                texts = (_short(key, settings_of(row).get(key)) for key in others)
                label = ", ".join(_run(text) if x == "step" else text for text in texts)
                lines.setdefault(label, []).append(row)
        for j, (label, line) in enumerate(lines.items()):
            line = sorted(line, key=lambda row: settings_of(row)[x])
            at = [settings_of(row)[x] for row in line]
            values = [row["value"] for row in line]
            ends = [
                [
                    abs(row["value"] - (row[k] if row.get(k) is not None else row["value"]))
                    for row in line
                ]
                for k in ("low", "high")
            ]
            style = "os^Dv<>P"[j % 8]
            axes.errorbar(at, values, ends, marker=style, capsize=2, label=label or None)
        axes.set_title(f"{name} {better(next(r for r in rows if name_of(r) == name))}")
        axes.set_xlabel(x.replace("_", " "))
        if min(axes_of[x]) > 0 and max(axes_of[x]) >= 4 * min(axes_of[x]):
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted(axes_of[x]), [f"{v:g}" for v in sorted(axes_of[x])])
            axes.minorticks_off()
        elif len(axes_of[x]) <= 6:
            axes.set_xticks(sorted(axes_of[x]))
        axes.grid(alpha=0.25)
        if i == 0 and len(lines) > 1:
            axes.legend(fontsize="small")
    out = io.BytesIO()
    canvas.print_png(out)
    return out.getvalue()


def _run(name: str) -> str:
    """A checkpoint's name without its step."""
    return re.sub(r"_\d{8,}\.\w+$", "", name)


# ------------------------------------------------------------------------------------ the page


def _pictures(rows: Sequence[Row], key: str, folder: Path) -> list[str]:
    """The pictures in the folder that rows name, each once, with what differs as its caption."""
    names = {row[key]: row for row in rows if row.get(key) and (folder / row[key]).is_file()}
    out = []
    for name, row in names.items():
        text = ", ".join(f"{k} {_short(k, settings_of(row).get(k))}" for k in swept(rows))
        image = image_of((folder / name).read_bytes(), f"{key}: {text or name}")
        out.append(f"<figure>{image}<figcaption>{escape(text)}</figcaption></figure>")
    return out


def to_html(rows: Sequence[Row], title: str, folder: Path, picture: bytes | None = None) -> str:
    """The page: a table, the plot, the grids of samples, and every number with its protocol."""
    heads, lines = columns(rows)
    keys = len(swept(rows))
    first = {name_of(row): row for row in reversed(list(rows))}
    marks = [f" {better(first[name])}" for name in heads[keys:]]
    best = set()
    for name in first if len(lines) > 1 else ():
        choose = min if better(first[name]) == "↓" else max
        top = choose((r for r in rows if name_of(r) == name), key=lambda r: r["value"])
        column = heads.index(name, keys)
        best |= {(i, column) for i, (_, n) in enumerate(lines) if n[column - keys] == number(top)}
    marked = [*heads[:keys], *(head + mark for head, mark in zip(heads[keys:], marks))]
    parts = [table(marked, [[*of, *numbers] for of, numbers in lines], keys, best)]
    if picture:
        text = "each metric against the swept setting; bars are 95% intervals"
        parts += ["<h2>Sweep</h2>", image_of(picture, text, 'class="plot"'), f"<p>{text}</p>"]
    grids = _pictures(rows, "grid", folder)
    if grids:
        parts += ["<h2>Samples</h2>", *grids]
    pages = _pictures(rows, "nearest", folder)
    if pages:
        text = "Samples, then their nearest training images, with the distance of features."
        parts += ["<h2>Nearest training images</h2>", f"<p>{text}</p>", *pages]
    items = "".join(f"<li><code>{escape(row['line'])}</code></li>" for row in rows)
    parts += ["<h2>Numbers with their protocols</h2>", f"<ul>{items}</ul>"]
    return document(title, parts)
