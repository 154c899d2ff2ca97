"""Line charts as inline SVG, in the colours of light and dark pages, without a plotting library."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from .html import escape

_W, _H = 400, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 22
_BUCKETS = 200
# Hues that neighbours tell apart, for eyes that see no red or green, too.
_HUES = (212, 28, 172, 320, 48, 262, 95, 0)

STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr));
  gap: 1.4rem 1.6rem }
.chart { margin: 0; display: flex; flex-direction: column; justify-content: space-between }
.chart figcaption { opacity: 1; max-width: none }
.chart figcaption b { display: block; font-size: .95rem }
.chart svg { width: 100%; display: block; touch-action: pan-y; overflow: visible }
.chart polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round }
.chart .faint { opacity: .35; stroke-width: 1 }
.chart circle { stroke: none }
.chart path { stroke: var(--line); fill: none } .chart .cursor { stroke: var(--text); opacity: .5 }
.chart text { font: 11px system-ui, sans-serif; fill: var(--text); opacity: .75 }
.key span { display: inline-block; margin-right: .9rem; font-variant-numeric: tabular-nums }
.key i { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px;
  margin-right: .3rem }
"""

# Under the pointer, each line's value stands in the key, and the place on the axis in the title.
SCRIPT = """
for (const figure of document.querySelectorAll('.chart')) {
  const svg = figure.querySelector('svg'), cursor = figure.querySelector('.cursor');
  const [x0, x1, y0, y1, log, left, width, top, height] = svg.dataset.scale.split(' ').map(Number);
  const lines = [...svg.querySelectorAll('polyline')].map(line => [...line.points]);
  const values = [...figure.querySelectorAll('.key output')];
  const shown = figure.querySelector('b output');
  const leave = () => {
    cursor.setAttribute('d', ''); shown.value = ''; values.forEach(v => v.value = '') };
  svg.addEventListener('pointerleave', leave);
  svg.addEventListener('pointermove', event => {
    const at = new DOMPoint(event.clientX, event.clientY)
      .matrixTransform(svg.getScreenCTM().inverse());
    const near = lines.map(points => points.reduce((a, b) =>
      Math.abs(b.x - at.x) < Math.abs(a.x - at.x) ? b : a));
    const x = near.reduce((a, b) => Math.abs(b.x - at.x) < Math.abs(a.x - at.x) ? b : a).x;
    cursor.setAttribute('d', `M${x} ${top}v${height}`);
    shown.value = ' at ' + Math.round(x0 + (x - left) / width * (x1 - x0)).toLocaleString('en');
    near.forEach((point, i) => {
      const share = y0 + (top + height - point.y) / height * (y1 - y0);
      values[i].value = ' ' + Number((log ? 10 ** share : share).toPrecision(3));
    });
  });
}
"""


class Line(NamedTuple):
    """A curve of a chart: its points, of which those that aren't finite are left out.

    faint: drawn behind, as a noisy one is. hue: of its colour; by default its place's.
    """

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    faint: bool = False
    hue: float | None = None


def number(value: float) -> str:
    """A number of an axis or a table: 0.0025, 1.2e-05, 40k, 3M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and value % (size / 10) == 0):
            return f"{value / size:.3g}{letter}"
    return f"{value:.{4 if abs(value) >= 1000 else 3}g}"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from low to high, at most so many."""
    size = (high - low) / most
    power = 10.0 ** math.floor(math.log10(size))
    step = next(m * power for m in (1, 2, 5, 10, 20) if m * power >= size * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from 10^low to 10^high: powers of ten or, if these are few, numbers between."""
    for factors in ((1,), (1, 3), (1, 2, 5)):
        exponents = range(math.floor(low), math.ceil(high) + 1)
        found = [f * 10.0**k for k in exponents for f in factors]
        found = [x for x in found if low - 1e-9 <= math.log10(x) <= high + 1e-9]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / 6)]
    return ticks(10**low, 10**high, 4)


def thin(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    """Points of a long curve: the lowest and the highest of each of equally many points' bucket."""
    points = [(x, y) for x, y in zip(xs, ys) if math.isfinite(x) and math.isfinite(y)]
    if len(points) <= 2 * _BUCKETS:
        return points
    kept = {points[0], points[-1]}
    for i in range(_BUCKETS):
        bucket = points[i * len(points) // _BUCKETS : (i + 1) * len(points) // _BUCKETS]
        kept |= {min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
    return sorted(kept)


def chart(title: str, lines: Sequence[Line], log: bool = False, x_label: str = "step") -> str:
    """A figure of curves with its key; "" where there are no points.

    log: a logarithmic axis, if all values are positive; other axes have the 0.
    """
    curves = [(line, thin(line.xs, line.ys)) for line in lines]
    curves = [(line, points) for line, points in curves if points]
    if not curves:
        return ""
    xs = [x for _, points in curves for x, _ in points]
    ys = [y for _, points in curves for _, y in points]
    log = log and min(ys) > 0
    low, high = (math.log10(f(ys)) if log else f(0, *ys) for f in (min, max))
    pad = (high - low) / 20 or (0.15 if log else 1)
    low, high = low - pad * (log or low < 0), high + pad
    first, last = min(xs), max(xs)
    if first == last:
        first, last = first - 1, last + 1
    width, height = _W - _LEFT - _RIGHT, _H - _TOP - _BOTTOM

    def across(x: float) -> float:
        return round(_LEFT + (x - first) / (last - first) * width, 1)

    def down(y: float) -> float:
        share = ((math.log10(y) if log else y) - low) / (high - low)
        return round(_TOP + (1 - share) * height, 1)

    parts = []
    for y in log_ticks(low, high) if log else ticks(low, high):
        parts.append(f'<path d="M{_LEFT} {down(y)}H{_W - _RIGHT}"/>')
        parts.append(
            f'<text x="{_LEFT - 5}" y="{down(y) + 4}" text-anchor="end">{number(y)}</text>'
        )
    for x in ticks(first, last, 6):
        anchor = "end" if across(x) > _W - 20 else "middle"
        parts.append(
            f'<text x="{across(x)}" y="{_H - 5}" text-anchor="{anchor}">{number(x)}</text>'
        )
    keys = []
    for i, (line, points) in enumerate(curves):
        hue = _HUES[i % len(_HUES)] if line.hue is None else line.hue
        color = f"hsl({hue:.0f} 75% var(--tone))"
        faint = ' class="faint"' if line.faint else ""
        path = " ".join(f"{across(x)},{down(y)}" for x, y in points)
        parts.append(f'<polyline{faint} style="stroke:{color}" points="{path}"/>')
        if len(points) <= 30 and not line.faint:  # a single one is no line
            parts += [
                f'<circle cx="{across(x)}" cy="{down(y)}" r="2.2" style="fill:{color}"/>'
                for x, y in points
            ]
        keys.append(
            f'<span><i style="background:{color}{";opacity:.4" * line.faint}"></i>'
            f"{escape(line.label)}<output></output></span>"
        )
    scale = (first, last, low, high, int(log), _LEFT, width, _TOP, height)
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}<output></output></b>'
        f'<div class="key">{"".join(keys)}</div></figcaption>'
        f'<svg viewBox="0 0 {_W} {_H}" role="img" aria-label="{escape(title)} by {x_label}" '
        f'data-scale="{" ".join(f"{v:.9g}" for v in scale)}">{"".join(parts)}'
        '<path class="cursor" d=""/></svg></figure>'
    )
