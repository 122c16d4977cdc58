"""What all pages share: escaping, tables, the style, and how a page is written.

A model may be hostile, and so may every name in it: text is cut, made printable (controls, terminal escapes and
direction overrides as escapes) and escaped. A page has no script; its policy forbids to load anything.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from normfuse.cli_print import clean
from normfuse.errors import InputError
from normfuse.html.style import STYLE

if TYPE_CHECKING:
    from normfuse.io.write import Put

NAME, PROSE = 88, 600
"""Characters shown of a name, and of a sentence."""
MOST_ROWS = 1000
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
START = "<!doctype html>"


def text(value: object, most: int = PROSE) -> str:
    """Any text as HTML."""
    return html.escape(clean(_cut(str(value), most)))


def _cut(value: str, most: int) -> str:
    if len(value) <= most:
        return value
    end = most // 3
    return f"{value[: most - end]} … {value[-end:]} ({len(value):,} characters)"


def name(value: object) -> str:
    """A name out of a model, apart from the text around it whatever its direction."""
    return f'<bdi class="name">{text(value, NAME)}</bdi>'


def many(count: int, word: str, rest: str = "") -> str:
    """A number of things: ``1 norm``, ``1,200 norms``, ``2 kinds of operators``."""
    return f"{count:,} {word}{'s' * (count != 1)}{rest}"


def formula(value: str) -> str:
    """A fact with powers raised."""
    raised = re.sub(r"\^(-?)(\d+(?:/\d+|\.\d+)?)",
                    lambda m: f"<sup>{'−' if m[1] else ''}{m[2]}</sup>", text(value, 300))  # fmt: skip
    return f'<span class="formula">{raised.replace("*", "·").replace(" - ", " − ")}</span>'


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = (), label: str = "",
          most: int = MOST_ROWS, kind: str = "rows") -> str:  # fmt: skip
    """A table in a box of its own that scrolls, by keys too; cells are HTML. Columns that are empty in every row are
    left out.

    `kind`: on a narrow screen the cells of one of "rows" stand one below the other, each with its header; the others
    get narrow columns, "short" has no cell that needs a second line.
    """
    all_rows = list(rows)
    shown = all_rows[:most]
    keep = [i for i in range(len(headers)) if any(row[i] for row in shown)]
    marks = {i: ' class="number"' if i in numeric else "" for i in keep}
    plain = {i: re.sub("<[^>]*>", "", headers[i]) for i in keep}
    names = {i: f' data-label="{plain[i]}"' if kind == "rows" else "" for i in keep}
    head = "".join(f'<th scope="col"{marks[i]}>{headers[i]}</th>' for i in keep)
    body = "\n".join("<tr>" + "".join(f"<td{marks[i]}{names[i]}>{row[i]}</td>" for i in keep) + "</tr>"
                     for row in shown)  # fmt: skip
    rest = len(all_rows) - len(shown)
    more = f'<p class="muted">{rest:,} more rows are left out; --json has all of them.</p>' if rest else ""
    box = f'<div class="scroll {kind}" tabindex="0" role="region" aria-label="{text(label or "table")}">'
    return f"{box}<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>{more}"


def items(pairs: Iterable[tuple[str, str]]) -> str:
    """Terms with what they are; HTML."""
    return "<dl>" + "".join(f"<div><dt>{term}</dt><dd>{value}</dd></div>" for term, value in pairs) + "</dl>"


def fold(summary: str, body: str, is_open: bool = False) -> str:
    """What is shown when asked for; HTML."""
    return f"<details{' open' if is_open else ''}><summary>{summary}</summary>\n{body}\n</details>"


def section(key: str, title: str, body: str) -> str:
    """A section with a heading; HTML."""
    return f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>\n{body}\n</section>'


def document(title: str, body: str) -> str:
    """A whole page; the title is text, the body HTML."""
    return f"""{START}
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text(title, NAME)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def check(target: Path, models: Iterable[Path], overwrite: bool) -> Put:
    """How the page gets its name; raises `InputError` over a model, or over anything but a page."""
    from normfuse.io import files

    if any(os.path.realpath(target) == os.path.realpath(model) for model in models):  # a ring of links, too
        raise InputError(f"{target}: is a model; choose another name for the report")
    if target.suffix in (".onnx", ".pt2"):
        raise InputError(f"{target}: the report is an HTML page; give a name that ends in .html")
    put = files.check_target(None, target, overwrite, False)
    if target.exists():
        with target.open("rb") as f:
            start = f.read(64)
        if start and not start.lstrip(b"\xef\xbb\xbf \r\n\t").lower().startswith((b"<!doctype html", b"<html")):
            raise InputError(f"{target}: is there already and no HTML page; choose another name for the report")
    return put


def write(page: str, target: Path, models: Iterable[Path], overwrite: bool) -> None:
    """Write a page whole or not at all."""
    from normfuse.io import files

    files.write_bytes(page.encode("utf-8", "backslashreplace"), target, put=check(target, models, overwrite))
