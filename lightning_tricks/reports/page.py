"""The report as one page of HTML that needs nothing else."""

import struct
from base64 import b64encode
from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #5b6570; --paper: #ffffff; --line: #d5dae0; --tint: #f3f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #a4adb7; --paper: #16191d; --line: #3a424b; --tint: #20252b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.4rem 0 0.2rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 0.6rem; padding-top: 0.5rem; border-top: 1px solid var(--line); }
p { margin: 0.4rem 0; max-width: 50rem; }
.soft, figcaption { color: var(--soft); font-size: 0.88rem; }
nav { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; margin: 0.8rem 0 0; font-size: 0.95rem; }
a { color: inherit; text-underline-offset: 0.2em; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(30rem, 100%), 1fr)); gap: 1.4rem;
  align-items: start; margin-top: 0.8rem; }
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; max-width: 40rem; height: auto; border: 1px solid var(--line);
  border-radius: 6px; background: #ffffff; }
.pictures + .pictures { margin-top: 1.4rem; }
figcaption { margin-top: 0.3rem; max-width: 40rem; }
.table { overflow-x: auto; max-width: 100%; margin: 0.6rem 0; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { text-align: left; vertical-align: top; padding: 0.28rem 0.9rem 0.28rem 0.4rem;
  border-bottom: 1px solid var(--line); }
td { max-width: 26rem; overflow-wrap: break-word; }
.numbers td { white-space: nowrap; }
thead th { background: var(--tint); max-width: 20rem; overflow-wrap: break-word; }
thead small { font-weight: 400; }
tbody th { font-weight: 500; background: var(--paper); max-width: 45vw; overflow-wrap: break-word; }
th:first-child { position: sticky; left: 0; }
small { color: var(--soft); display: block; }
details { margin: 0.6rem 0; }
summary { cursor: pointer; }
@media print {
  :root { color-scheme: light; --ink: #000000; --soft: #444444; --paper: #ffffff; --line: #bbbbbb; --tint: #eeeeee; }
  html { font-size: 11px; } body { max-width: none; padding: 0; } nav { display: none; }
  .pictures { grid-template-columns: 1fr 1fr; } figure, tr { break-inside: avoid; } h2 { break-after: avoid; }
  .table { overflow: visible; } details::details-content { content-visibility: visible; block-size: auto; } }
"""


def page(title: str, lead: Sequence[str], sections: Sequence[tuple[str, str]]) -> str:
    """The whole page.

    Args:
        title: plain text.
        lead: sentences below it, plain text.
        sections: headings, plain text, and what is below them, HTML.
    """
    links = "".join(f'<a href="#s{index}">{escape(heading)}</a>' for index, (heading, _) in enumerate(sections))
    body = "".join(
        f'<section id="s{index}"><h2>{escape(heading)}</h2>\n{content}</section>\n'
        for index, (heading, content) in enumerate(sections)
    )
    # An empty icon keeps a browser from asking a server for one.
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body><header><h1>{escape(title)}</h1>\n"
        f"{paragraphs(lead)}<nav>{links}</nav></header>\n<main>\n{body}</main></body></html>\n"
    )


def paragraphs(sentences: Sequence[str], kind: str = "") -> str:
    """Each sentence as a paragraph."""
    marked = f' class="{kind}"' if kind else ""
    return "".join(f"<p{marked}>{escape(sentence)}</p>\n" for sentence in sentences)


def source(png: bytes, file: str) -> str:
    """The attributes of an image that hold a picture, and the name of its file."""
    return f'src="data:image/png;base64,{b64encode(png).decode()}" data-file="{escape(file)}"'


def picture(png: bytes, title: str, caption: str, file: str = "") -> str:
    """A picture inside of the page, which may also be in a file of this name in the folder of pictures."""
    width, height = struct.unpack(">II", png[16:24])  # where every PNG has them
    image = f'<img {source(png, file)} alt="{escape(title)}" width="{width}" height="{height}">'
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{image}{below}</figure>\n"


def pictures(figures: Sequence[str]) -> str:
    """Pictures beside each other where there is room."""
    return f'<div class="pictures">\n{"".join(figures)}</div>\n'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "words") -> str:
    """A table whose first column names the rows; what follows a line break in a cell is small."""
    top = "".join(f'<th scope="col">{_cell(text)}</th>' for text in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{_cell(text)}</td>" for text in rest)}</tr>\n'
        for first, *rest in rows
    )
    content = f"<thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody>"
    return f'<div class="table"><table class="{kind}">{content}</table></div>\n'


def _cell(text: str) -> str:
    first, _, rest = text.partition("\n")
    return escape(first) + (f"<small>{escape(rest)}</small>" if rest else "")


def folded(summary: str, content: str) -> str:
    """Content that is shown when its summary is clicked, and in print."""
    return f"<details><summary>{escape(summary)}</summary>\n{content}</details>\n"
