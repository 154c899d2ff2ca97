"""docs/samplers.md: tables of figures by budget, between markers that name their script, and the
recommendation that follows from all of them."""

import re
from collections.abc import Iterable, Mapping

from .budgets import BUDGETS, ROOT, SAMPLERS

PAGE = ROOT / "docs" / "samplers.md"

Rows = dict[str, list[float]]


def table(head: str, rows: Rows, bold: Iterable[tuple[str, int]], form: str = ".2g") -> str:
    """Rows of figures as Markdown, in their order; bold: names and columns."""
    bold = set(bold)
    lines = [f"| {head} | " + " | ".join(map(str, BUDGETS)) + " |", "|---" * 6 + "|"]
    for name, row in rows.items():
        cells = [f"{value:{form}}" for value in row]
        cells = [f"**{c}**" if (name, i) in bold else c for i, c in enumerate(cells)]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def replace(text: str, name: str, script: str, section: str) -> str:
    """A page's text with a section between the markers of that name and script."""
    begin, end = f"<!-- {name}: benchmarks/{script} -->", f"<!-- end of {name} -->"
    before, rest = text.split(begin)
    return before + begin + "\n" + section + "\n" + end + rest.split(end)[1]


def _read(text: str, name: str) -> tuple[Rows, set[tuple[str, int]]]:
    """The figures of a table on the page, and the names and columns in bold."""
    section = text.split(f"<!-- {name}: ")[1].split(f"<!-- end of {name} -->")[0]
    cells = {
        n: row.split(" | ") for n, row in re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.M)
    }
    rows = {n: [float(c.strip("*")) for c in row] for n, row in cells.items()}
    return rows, {(n, i) for n, row in cells.items() for i, c in enumerate(row) if c[0] == "*"}


def recommendation(text: str) -> str:
    """What to take by budget and kind, as Markdown: of the samplers whose digits can't be told from
    the best ones, the three that are best on the mixture, or all that are exact there."""
    errors, _ = _read(text, "errors")
    distances, exact = _read(text, "distances")
    _, good = _read(text, "digits distances")

    def best(stochastic: bool, i: int) -> str:
        rows = distances if stochastic else errors
        names = [n for n in rows if SAMPLERS[n].stochastic == stochastic and (n, i) in good]
        names.sort(key=lambda n: (rows[n][i], n))
        at_floor = sorted(n for n in names if stochastic and (n, i) in exact)
        return ", ".join(f"`{n}`" for n in at_floor or names[:3]) or "none"

    lines = ["| evaluations | ODE samplers | with noise |", "|---|---|---|"]
    lines += [f"| {b} | {best(False, i)} | {best(True, i)} |" for i, b in enumerate(BUDGETS)]
    return "\n".join(lines)


def write(script: str, sections: Mapping[str, str]) -> None:
    """Put a script's sections on the page, and the recommendation that follows."""
    text = PAGE.read_text()
    for name, section in sections.items():
        text = replace(text, name, script, section)
    text = replace(text, "recommendation", "page.py", recommendation(text))
    PAGE.write_text(text)
    print(f"wrote {PAGE.relative_to(ROOT)}")
