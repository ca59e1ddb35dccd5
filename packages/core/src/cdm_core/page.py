"""A small vocabulary of HTML for one self-contained page: no scripts, nothing fetched, light and dark."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ground: #f6f7f9; --card: #ffffff; --ink: #1c2024; --soft: #60646c;
  --line: #e3e5e9; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --card: #1d2126; --ink: #e8eaed;
  --soft: #9aa0a8; --line: #31363d; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 .9rem; }
p { margin: .4rem 0 .9rem; max-width: 48rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 1.3rem 1.4rem; margin-top: 1.25rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .9rem;
  margin-top: 1.5rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 1rem 1.1rem; }
.tile b { display: block; font-size: 1.65rem; font-weight: 650; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.tile.main b { color: var(--accent); }
.figures { display: flex; flex-wrap: wrap; gap: 1.1rem; }
figure { margin: 0; max-width: 100%; flex: 0 1 auto; }
figure.plot { flex: 1 1 26rem; max-width: 40rem; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 8px;
  padding: 6px; }
figure.plot img { width: 100%; }
figure.pixels img { image-rendering: pixelated; }
figcaption { margin-top: .45rem; max-width: 40rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .94rem; }
th, td { text-align: left; padding: .34rem 1.6rem .34rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; color: var(--soft); }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { background: var(--ground); border: 1px solid var(--line); border-radius: 8px;
  padding: .9rem 1rem;
  overflow-x: auto; font: .84rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  margin: .5rem 0 0; }
details + details { margin-top: .8rem; }
summary { cursor: pointer; font-weight: 600; }
"""


def page(title: str, subtitle: str, body: Iterable[str]) -> str:
    """The whole document; `body` is HTML, the rest text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
        f'<h1>{escape(title)}</h1>\n<div class="soft">{escape(subtitle)}</div>\n'
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A card with a heading; parts are HTML. Empty without parts."""
    content = "\n".join(part for part in parts if part)
    return f"<section><h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def paragraph(text: str) -> str:
    """A paragraph of text."""
    return f"<p>{escape(text)}</p>"


def tiles(items: Sequence[tuple[str, str, str]]) -> str:
    """Key figures as (label, value, remark), the first one accented."""
    cells = [
        f'<div class="tile{" main" if index == 0 else ""}"><span class="soft">{escape(label)}</span>'
        f'<b>{escape(value)}</b><span class="soft">{escape(remark)}</span></div>'
        for index, (label, value, remark) in enumerate(items)
    ]
    return f'<div class="tiles">{"".join(cells)}</div>' if cells else ""


def figure(png: bytes, caption: str, *, pixels: bool = False) -> str:
    """A PNG within the page; `pixels`: shown at its own size, without smoothing."""
    kind, alt, data = ("pixels" if pixels else "plot"), escape(caption), base64.b64encode(png).decode()
    image = f'<img alt="{alt}" src="data:image/png;base64,{data}">'
    return f'<figure class="{kind}">{image}<figcaption>{alt}</figcaption></figure>'


def figures(items: Iterable[str]) -> str:
    """Figures side by side where there is room."""
    content = "".join(items)
    return f'<div class="figures">{content}</div>' if content else ""


def table(names: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Iterable[int] = ()) -> str:
    """A table of text; the columns `numbers` are right-aligned."""
    right = set(numbers)
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        f"<tr>{''.join(_cell(cell, i in right) for i, cell in enumerate(row))}</tr>" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str, number: bool) -> str:
    return f"<td{' class=number' if number else ''}>{escape(text)}</td>"


def code(text: str) -> str:
    """Preformatted text."""
    return f"<pre>{escape(text.rstrip())}</pre>"


def folded(summary: str, content: str, *, opened: bool = False) -> str:
    """Content (HTML) behind a line (text) that unfolds it."""
    return f"<details{' open' if opened else ''}><summary>{escape(summary)}</summary>{content}</details>"
