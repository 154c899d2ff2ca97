"""Parts of self-contained HTML pages: style, tables, pictures, the document itself."""

import base64
import html
from collections.abc import Collection, Sequence

escape = html.escape

STYLE = """
:root { color-scheme: light dark; --line: #d0d4da; --soft: #f3f5f7; --back: #fff; --text: #1b1f24;
  --tone: 42% }
@media (prefers-color-scheme: dark) { :root { --line: #3a4048; --soft: #20252b; --back: #15191e;
  --text: #e4e8ec; --tone: 66% } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.wide { overflow-x: auto }
table { border-collapse: collapse } th, td { padding: .3rem .8rem; text-align: right;
  border-bottom: 1px solid var(--line); white-space: nowrap; font-variant-numeric: tabular-nums }
th { background: var(--soft) } th.key, td.key { text-align: left }
td.best { font-weight: 600 } img { max-width: 100%; image-rendering: pixelated }
img.plot { image-rendering: auto; background: #fff; border-radius: 6px }
figure { display: inline-block; margin: 0 1rem 1.5rem 0; vertical-align: top; max-width: 100% }
figcaption { font-size: .85rem; opacity: .8; max-width: 32rem } code { font-size: .85rem }
li { margin-bottom: .25rem; overflow-wrap: anywhere }
pre { background: var(--soft); padding: .7rem 1rem; border-radius: 6px; overflow-x: auto }
"""


def image(data: bytes, text: str, attributes: str = "", kind: str = "png") -> str:
    """An <img> that holds the file's bytes. text: what it shows. kind: png, jpeg."""
    source = base64.b64encode(data).decode()
    return f'<img {attributes} alt="{escape(text)}" src="data:image/{kind};base64,{source}">'


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    keys: int = 1,
    best: Collection[tuple[int, int]] = (),
) -> str:
    """A table of texts. keys: how many columns are keys. best: (row, column) of bold cells."""

    def cells(tag: str, row: int, texts: Sequence[str]) -> str:
        kinds = ["key" if j < keys else "best" * ((row, j) in best) for j in range(len(texts))]
        marks = [f' class="{kind}"' if kind else "" for kind in kinds]
        return "".join(f"<{tag}{m}>{escape(text)}</{tag}>" for m, text in zip(marks, texts))

    lines = [cells("th", -1, heads), *(cells("td", i, row) for i, row in enumerate(rows))]
    return '<div class="wide"><table>' + "".join(f"<tr>{x}</tr>" for x in lines) + "</table></div>"


def document(title: str, parts: Sequence[str], style: str = "", script: str = "") -> str:
    """A page of its parts, which are HTML. style, script: beside those that all pages have."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head>\n<body>"
        + "\n".join([f"<h1>{escape(title)}</h1>", *parts])
        + (f"<script>{script}</script>" if script else "")
        + "</body></html>\n"
    )
