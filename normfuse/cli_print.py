"""Printing for people and programs: tables on a terminal, plain lines in a pipe, one JSON object on request.

Everything printed may come from a hostile model: control characters are shown as escapes, markup is not read.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

Advance = Callable[[str, float], None]

WHOLE, FOLDED = 16, 12
"""The widest cells that are not folded, and how wide a column of others is at least."""
PATIENCE = 0.7
"""Seconds before a progress bar appears."""

STYLES = {
    "fused": "green", "converted": "green", "yes": "green", "equal": "green", "kept": "cyan",
    "refused": "yellow", "no": "red", "different": "red",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Table:
    """Headers and rows; a column that is empty in every row is not printed."""

    headers: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


Block = str | Table


def clean(text: str) -> str:
    """The text with everything that could act on a terminal written as an escape: controls, ANSI, bidi, surrogates."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def print_json(data: dict[str, Any]) -> None:
    """One JSON object on stdout, in ASCII; numbers that JSON lacks become null."""
    with _pipe():
        print(json.dumps(_finite(data), indent=2))


def print_blocks(blocks: list[Block]) -> None:
    """Lines and tables on stdout: by rich on a terminal, as plain text elsewhere."""
    with _pipe():
        if sys.stdout.isatty():
            _print_rich(blocks)
        else:
            _print_plain(blocks, sys.stdout)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def _pipe() -> Iterator[None]:
    """Write what the encoding of stdout cannot hold as escapes, and stop without a word when the reader has left."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _columns(table: Table) -> list[int]:
    return [i for i in range(len(table.headers)) if any(row[i] for row in table.rows)]


def _print_plain(blocks: list[Block], out: IO[str]) -> None:
    """Tables as aligned columns without lines: one row, one line, never cut."""
    for block in blocks:
        if isinstance(block, str):
            print(clean(block), file=out)
            continue
        keep = _columns(block)
        rows = [[block.headers[i].upper() for i in keep]]
        rows += [[clean(row[i]) or "-" for i in keep] for row in block.rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(keep))]
        for row in rows:
            print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip(), file=out)
        print(file=out)


def _print_rich(blocks: list[Block]) -> None:
    from rich import box, table
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, markup=False, emoji=False)
    if console.width < 1:  # COLUMNS=0
        console.width = 80
    for block in blocks:
        if isinstance(block, str):
            line = Text(clean(block))
            line.highlight_words(("RMSNorm", "LayerNorm"), "cyan")
            console.print(line, soft_wrap=True)
            continue
        keep = _columns(block)
        widths = [max(len(block.headers[i]), *(len(clean(row[i])) for row in block.rows)) for i in keep]
        if sum(2 + (w if w <= WHOLE else FOLDED) for w in widths) > console.width:
            _print_plain([block], sys.stdout)  # which the terminal wraps: nothing may be cut
            continue
        grid = table.Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
        for i, width in zip(keep, widths, strict=True):
            grid.add_column(Text(block.headers[i]), no_wrap=width <= WHOLE, overflow="fold")
        for row in block.rows:
            grid.add_row(*(Text(clean(row[i]), style=STYLES.get(row[i], "")) for i in keep))
        console.print(grid)


@contextlib.contextmanager
def progress(wanted: bool) -> Iterator[Advance | None]:
    """Give a function of (stage, fraction done) that draws a bar on a terminal's stderr once it takes long."""
    if not (wanted and sys.stderr.isatty()):
        yield None
        return
    with contextlib.ExitStack() as stack:
        yield _bar(stack)


def _bar(stack: contextlib.ExitStack) -> Advance:
    started = time.monotonic()
    shown: list[Any] = []

    def advance(stage: str, fraction: float) -> None:
        if not shown:
            if time.monotonic() - started < PATIENCE:
                return
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
            bar = stack.enter_context(Progress(*columns, console=Console(stderr=True), transient=True))
            shown.extend((bar, bar.add_task(clean(stage), total=1.0)))
        bar, task = shown
        bar.update(task, completed=fraction, description=clean(stage))

    return advance
