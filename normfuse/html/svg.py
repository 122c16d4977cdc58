"""Drawings: the block of a model, and plots of numbers. Inline SVG, coloured by the style of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from normfuse.card import KINDS, Block, Card, CardPart
from normfuse.html.page import text

STREAM, LEFT = 80, 168
"""Where the residual stream runs, and where the boxes beside it begin."""
PILL, ROW, GAP = 26, 20, 16
BOX, NARROW = 214, 180


X = float | str
"""Where something stands or how wide it is: units, or parts of the drawing's width as text, such as "12%"."""


def _at(x: X) -> str:
    return x if isinstance(x, str) else f"{x:g}"


def part(share: float) -> str:
    """A share of the width of a plot."""
    return f"{100 * share:.4g}%"


@dataclass(slots=True)
class Drawing:
    """Shapes on a sheet that grows downwards."""

    shapes: list[str] = field(default_factory=list)
    y: float = 0.0

    def add(self, shape: str) -> None:
        self.shapes.append(shape)

    def line(self, points: Sequence[tuple[float, float]], kind: str, head: bool = False) -> None:
        """A line through points, with an arrow head that points down or to the left."""
        self.add(f'<polyline class="{kind}" points="{" ".join(f"{x:g},{y:g}" for x, y in points)}"/>')
        if head:
            (a, _), (x, y) = points[-2:]
            tip = [(x, y), (x - 4, y - 7), (x + 4, y - 7)] if a == x else [(x, y), (x + 7, y - 4), (x + 7, y + 4)]
            self.add(f'<polygon class="head" points="{" ".join(f"{u:g},{v:g}" for u, v in tip)}"/>')

    def box(self, x: X, y: float, w: X, h: float, kind: str, r: float) -> None:
        self.add(f'<rect class="{kind}" x="{_at(x)}" y="{y:g}" width="{_at(w)}" height="{h:g}" rx="{r:g}"/>')

    def rule(self, x: X, y: float, x2: X, y2: float, kind: str) -> None:
        """A straight line."""
        self.add(f'<line class="{kind}" x1="{_at(x)}" y1="{y:g}" x2="{_at(x2)}" y2="{y2:g}"/>')

    def text(self, x: X, y: float, words: str, kind: str = "") -> None:
        mark = f' class="{kind}"' if kind else ""
        self.add(f'<text{mark} x="{_at(x)}" y="{y:g}">{text(words)}</text>')


def svg(drawing: Drawing, width: float, height: float, title: str) -> str:
    """The drawing as an element; `title` is what it says to those who do not see it."""
    return (f'<svg role="img" width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}">'
            f"<title>{text(title)}</title>{''.join(drawing.shapes)}</svg>")  # fmt: skip


def plot(drawing: Drawing, height: float, title: str, kind: str = "plot") -> str:
    """A drawing as wide as there is room, with letters that stay as large; all that stands in it has its place by
    shares of the width."""
    return (f'<svg class="{kind}" role="img" width="100%" height="{height:g}"><title>{text(title)}</title>'
            f"{''.join(drawing.shapes)}</svg>")  # fmt: skip


# -- blocks ----------------------------------------------------------------------------------------------------------


def block(card: Card, shown: Block, depth: int = 0) -> str:
    """A layer from top to bottom: the stream as a line, branches beside it.

    `depth`, of a stack that is the only one: with the norms ahead of its first layer and behind its last.
    """
    out = Drawing()
    wide = max(len(branch.parts) for branch in shown.branches)
    box = BOX if wide == 1 else NARROW
    width = LEFT + wide * box + (wide - 1) * GAP + 12
    where = {"embedding": 0, "final": depth - 1}
    outside = [use for use in (card.norms[i] for i in card.outside) if where.get(use.place) in shown.layers and depth]
    out.y = 4
    for use in outside:
        if use.place == "embedding":
            out.y += 10
            _pill(out, STREAM, use.operator, "embedding")
    top = out.y = out.y + 10
    out.y += 12
    for branch in shown.branches:
        start = out.y
        ends: list[tuple[float, float]] = []
        for j, part in enumerate(branch.parts):
            centre = LEFT + j * (box + GAP) + box / 2
            ends.append((centre, _part(out, card, part, centre, box, start)))
        join = max(y for _, y in ends) + 16
        for centre, y in ends:
            out.line([(centre, y), (centre, join), (STREAM + 10, join)], "wire", head=True)
        out.add(f'<circle class="plus" cx="{STREAM}" cy="{join:g}" r="9"/>')
        out.line([(STREAM - 5, join), (STREAM + 5, join)], "stream")
        out.line([(STREAM, join - 5), (STREAM, join + 5)], "stream")
        out.y = join + 14
        for i in branch.stream:
            out.y += 4
            _pill(out, STREAM, card.norms[i].operator)
        out.y += 8
    out.box(3, top, width - 6, out.y - top, "frame", 8)
    for use in outside:
        if use.place == "final":
            out.y += 12
            _pill(out, STREAM, use.operator, "final")
    out.y += 14
    out.shapes.insert(0, f'<polyline class="stream" points="{STREAM},2 {STREAM},{out.y - 3:g}"/>')
    words = "; ".join([card.formula(b) for b in shown.branches])
    return svg(out, width, out.y, words)


def _part(out: Drawing, card: Card, part: CardPart, centre: float, box: float, y: float) -> float:
    """Draw one part down from y, and give back where it ends."""
    at: tuple[float, float] = (STREAM, y)
    y += GAP
    for i in part.before:
        at = _enter(out, at, centre, y)
        out.y = y
        _pill(out, centre, card.norms[i].operator)
        at, y = (centre, out.y), out.y + GAP
    uses = [card.norms[i] for i in part.inside]
    lines = [*part.details]
    height = 12 + ROW * (1 + len(lines)) + (PILL + 2) * len(uses)
    _enter(out, at, centre, y)
    out.box(centre - box / 2, y, box, height, "attention" if "attention" in part.kind else "ff", 7)
    out.text(centre, y + ROW, KINDS[part.kind], "mid")
    row = y + ROW
    for line in lines:
        row += ROW
        out.text(centre, row, line, "small mid")
    out.y = row + 8
    for use in uses:
        _pill(out, centre, use.operator, use.where, box - 16)
        out.y += 2
    y += height
    for i in part.after:
        out.line([(centre, y), (centre, y + GAP)], "wire", head=True)
        out.y = y + GAP
        _pill(out, centre, card.norms[i].operator)
        y = out.y
    out.y = y
    return y


def _enter(out: Drawing, at: tuple[float, float], centre: float, y: float) -> tuple[float, float]:
    x, start = at
    corner = [(centre, start)] if x != centre else []
    out.line([(x, start), *corner, (centre, y)], "wire", head=True)
    return centre, y


def _pill(out: Drawing, centre: float, operator: str, note: str = "", width: float = 0) -> None:
    """A norm, at the height where the drawing is, which then is below it."""
    width = width or (148 if note else 104)
    out.box(centre - width / 2, out.y, width, PILL, "ln" if operator == "LayerNorm" else "rms", PILL / 2)
    words = {"embedding": "embedding", "final": "final"}.get(note)
    label = f"{words} {operator}" if words else f"{operator} · {note}" if note else operator
    out.text(centre, out.y + 17, label, "small mid" if note else "mid")
    out.y += PILL


# -- plots -----------------------------------------------------------------------------------------------------------


def bars(before: int, after: int, largest: int) -> str:
    """Two bars, one below the other, on a common scale."""
    out = Drawing()
    for y, value, kind in ((1, before, "bar-before"), (9, after, "bar-after")):
        if value:
            out.box("0%", y, part(max(0.012, value / max(largest, 1))), 6, kind, 2)
    return plot(out, 16, f"{before} before, {after} now", "bars")


def ticks(top: float, count: int = 4) -> list[float]:
    """Round numbers from 0 to at least top."""
    if not top > 0 or not math.isfinite(top):
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(top / count))
    step = next(power * m for m in (1, 2, 5, 10) if power * m * count >= top * 0.999)
    return [step * i for i in range(math.ceil(top / step - 1e-9) + 1)]


def dots(series: Sequence[tuple[str, Sequence[float | None]]], unit: str, title: str) -> str:
    """One column per norm, in the order of the model: what was before as a ring, what is now as a dot."""
    count = max((len(values) for _, values in series), default=0)
    finite = [v for _, values in series for v in values if v is not None and math.isfinite(v)]
    marks = ticks(max(finite, default=0.0))
    low, left, wide = 206.0, 0.11, 0.86
    out = Drawing()

    def place(v: float) -> float:
        return low - (low - 24) * min(v / marks[-1], 1.0)

    for mark in marks:
        out.rule("0%", place(mark), "100%", place(mark), "grid")
        out.text("0%", place(mark) - 4, f"{mark:g}" + (f" {unit}" if unit and mark == marks[-1] else ""), "small")
    radius = max(1.6, min(4.5, 280 * wide / max(count, 1) / 2.4))
    for kind, values in series:
        for i, v in enumerate(values):
            if v is not None and math.isfinite(v):
                x = part(left + wide * (i + 0.5) / count)
                out.add(f'<circle class="{kind}" cx="{x}" cy="{place(v):.1f}" r="{radius:.1f}"/>')
    out.text(part(left), low + 20, "first norm", "small")
    out.text("100%", low + 20, f"norm {count}", "small end")
    return plot(out, low + 26, title)
