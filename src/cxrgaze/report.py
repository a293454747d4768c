"""The one renderer of reports: blocks as Markdown and as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Plot

_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .8rem; text-align: left; }
td { font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; }
img { max-width: 100%; background: #fff; }
figcaption { font-size: .9rem; opacity: .8; }
.verdict { border-left: .5rem solid var(--tone); padding: .4rem .8rem; font-size: 1.1rem; }
.verdict b { color: var(--tone); }
.good { --tone: #00734f; } .bad { --tone: #b8430a; } .open { --tone: #7a6100; }
@media (prefers-color-scheme: dark) {
  .good { --tone: #35c796; } .bad { --tone: #ff8a4c; } .open { --tone: #e0b93b; } }
@media print { body { max-width: none; margin: 0; font-size: 11px; }
  table, figure { break-inside: avoid; } }
@page { size: A4; margin: 15mm; }
"""


Tone = Literal["good", "bad", "open"]
TONES: dict[Tone, str] = {"good": "#0072b2", "bad": "#d55e00", "open": "#8a6d00"}
"""Colours of drawings, told apart without colour vision."""
MARKERS: dict[Tone, str] = {"good": "o", "bad": "X", "open": "D"}


@dataclass(frozen=True)
class Heading:
    """A second-level heading."""

    text: str

    def markdown(self) -> str:
        """As Markdown."""
        return f"## {self.text}"

    def html(self) -> str:
        """As HTML."""
        return f"<h2>{html.escape(self.text)}</h2>"


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of plain text."""

    text: str

    def markdown(self) -> str:
        """As Markdown."""
        return self.text

    def html(self) -> str:
        """As HTML."""
        return f"<p>{html.escape(self.text)}</p>"


@dataclass(frozen=True)
class Verdict:
    """What a page comes to, in a word and a sentence; a sign, so that colour is not alone."""

    word: str
    text: str
    tone: Tone

    def markdown(self) -> str:
        """As Markdown."""
        return f"**{_SIGNS[self.tone]} {self.word}.** {self.text}"

    def html(self) -> str:
        """As HTML."""
        word, text = html.escape(self.word), html.escape(self.text)
        return f'<p class="verdict {self.tone}"><b>{_SIGNS[self.tone]} {word}.</b> {text}</p>'


_SIGNS = {"good": "✓", "bad": "✗", "open": "?"}


@dataclass(frozen=True)
class Bullets:
    """A list of plain lines."""

    lines: Sequence[str]

    def markdown(self) -> str:
        """As Markdown."""
        return "\n".join(f"- {line}" for line in self.lines)

    def html(self) -> str:
        """As HTML."""
        return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in self.lines) + "</ul>"


@dataclass(frozen=True)
class Table:
    """A table; cells are shown as text."""

    header: Sequence[object]
    rows: Sequence[Sequence[object]]

    def markdown(self) -> str:
        """As Markdown."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        cells = [[_markdown_cell(str(cell)) for cell in line] for line in lines]
        return "\n".join(f"| {' | '.join(line)} |" for line in cells)

    def html(self) -> str:
        """As HTML."""
        head, *body = (
            "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in line)
            for tag, line in [("th", self.header), *(("td", row) for row in self.rows)]
        )
        rows = "".join(f"<tr>{row}</tr>" for row in body)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


@dataclass(frozen=True)
class Figure:
    """A picture: its file name (.svg or .png), its bytes and what it shows."""

    name: str
    data: bytes
    caption: str

    def markdown(self) -> str:
        """As Markdown; the picture is a file beside the page."""
        return f"![{self.caption}]({self.name})"

    def html(self) -> str:
        """As HTML with the picture inside."""
        media = "image/svg+xml" if self.name.endswith(".svg") else "image/png"
        data, caption = base64.b64encode(self.data).decode(), html.escape(self.caption)
        return (
            f'<figure><img alt="{caption}" src="data:{media};base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )


def new_plot(width: float, height: float) -> Plot:
    """A plot of so many inches."""
    from matplotlib.figure import Figure as Plot

    return Plot(figsize=(width, height), layout="constrained")


def drawn(name: str, plot: Plot, caption: str) -> Figure:
    """A plot of matplotlib as a figure, the same bytes for the same plot; SVG or PNG by `name`."""
    import matplotlib

    data = io.BytesIO()
    if name.endswith(".svg"):
        with matplotlib.rc_context({"svg.hashsalt": "cxrgaze", "svg.fonttype": "none"}):
            plot.savefig(data, format="svg", metadata={"Date": None})
    else:
        plot.savefig(data, format="png", dpi=90, metadata={"Software": None})
    return Figure(name, data.getvalue(), caption)


def _markdown_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


Block = Heading | Paragraph | Verdict | Bullets | Table | Figure


def page_files(stem: str, title: str, blocks: Sequence[Block]) -> dict[str, bytes]:
    """The page as Markdown and as HTML: files by name, which `stem` is without its suffix."""
    return {
        f"{stem}.md": markdown_page(title, blocks).encode(),
        f"{stem}.html": html_page(title, blocks).encode(),
    }


def markdown_page(title: str, blocks: Sequence[Block]) -> str:
    """The page as Markdown; its figures are files beside it."""
    return "\n\n".join([f"# {title}", *(block.markdown() for block in blocks)]) + "\n"


def html_page(title: str, blocks: Sequence[Block]) -> str:
    """The page as HTML that needs nothing else: no network, light and dark, prints on A4."""
    title = html.escape(title)
    body = "\n".join(block.html() for block in blocks)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>{title}</h1>\n{body}\n</body></html>\n"
    )
