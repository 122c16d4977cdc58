"""The recipes of models side by side: what `normfuse inspect A B C --report` writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from normfuse.card import Card, NormUse, layers_text
from normfuse.cli_env import version
from normfuse.facts import number
from normfuse.html import svg
from normfuse.html.page import document, fold, name, table, text
from normfuse.report import Report

MOST_BLOCKS = 6
"""Kinds of layers that are drawn."""


@dataclass(slots=True)
class Entry:
    """A model of the gallery: its report, or why it could not be read."""

    path: str
    report: Report | None = None
    error: str = ""


def gallery(entries: Sequence[Entry]) -> str:
    """The page."""
    read = [entry for entry in entries if entry.report is not None]
    title = Path(entries[0].path).name if len(entries) == 1 else f"{len(entries)} models"
    many = f"<h1>How {len(entries)} models normalise</h1>" if len(entries) > 1 else f"<h1>{name(title)}</h1>"
    head = f'<p class="kicker">NormFuse {text(version("normfuse") or "")}: recipes read off the graphs</p>{many}'
    compare = f'<section aria-label="comparison">{_comparison(entries)}</section>' if len(read) > 1 else ""
    cards = "\n".join(_entry(entry, i, len(entries) == 1) for i, entry in enumerate(entries))
    return document(f"{title}: how it normalises" if len(entries) == 1 else f"How {title} normalise",
                    f'{head}{compare}<div{" class=gallery" if len(entries) > 1 else ""}>{cards}</div>')  # fmt: skip


def _comparison(entries: Sequence[Entry]) -> str:
    rows = []
    for i, entry in enumerate(entries):
        report = entry.report
        if report is None:
            continue
        card = report.card or Card()
        parts = [p for s in card.stacks for block in s.blocks for b in block.branches for p in b.parts]
        inside = dict.fromkeys(", ".join(p.details) for p in parts if p.kind == "feed_forward")
        rows.append((
            f'<a href="#model-{i}">{name(Path(entry.path).name)}</a>', text(report.recipe),
            text("; ".join(filter(None, inside))), " + ".join(str(s.depth) for s in card.stacks),
            _choices(number(u.eps) for u in card.norms), _choices(_weight(u) for u in card.norms),
            str(len(report.norms)), str(report.refused),
        ))  # fmt: skip
    headers = ("model", "recipe", "feed-forward", "layers", "eps", "weight", "norms", "refused")
    return table(headers, rows, (6, 7), "comparison")


def _choices(words: Iterable[str]) -> str:
    return f'<span class="nb">{text(", ".join(dict.fromkeys(words)))}</span>'


def _weight(use: NormUse) -> str:
    return use.weight + (" and bias" if use.bias else "")


def _entry(entry: Entry, index: int, alone: bool) -> str:
    title = "" if alone else f"<h2>{name(Path(entry.path).name)}</h2>"
    report = entry.report
    if report is None:
        return f'<article class="card">{title}<p class="verdict bad">{text(entry.error)}</p></article>'
    opset = "" if report.opset is None else f", opset {report.opset}"
    refused = f", {report.refused} refused" if report.refused else ""
    facts = f"{report.format or 'model'}{opset}, {report.nodes_before:,} operators, {len(report.norms)} norms{refused}"
    inner = f'<p><strong>{text(report.recipe)}</strong><br><span class="muted">{text(facts)}</span></p>'
    if report.card is not None:
        inner += recipe(report.card)
    if report.refusals:
        rows = [(text(r.code), name(r.node), text(r.message)) for r in report.refusals]
        inner += fold(f"{report.refused} refused", table(("code", "node", "why"), rows, label="refusals", most=100))
    if report.notes:
        inner += "".join(f'<p class="muted">{text(note)}</p>' for note in report.notes)
    return f'<article class="card" id="model-{index}">{title}{inner}</article>'


def recipe(card: Card) -> str:
    """A card: each kind of layer drawn, and the norms in a table."""
    drawn: list[str] = []
    left = 0
    for i, stack in enumerate(card.stacks):
        for block in stack.blocks:
            if len(drawn) == MOST_BLOCKS:
                left += 1
                continue
            where = layers_text(block.layers, stack.depth)
            caption = where if len(card.stacks) == 1 else f"stack {i + 1}, {where}"
            lines = "".join(f"<br><code>{text(card.formula(b))}</code>" for b in block.branches)
            differ = card.differences(block, stack.blocks[0])
            notes = "".join(f'<br><span class="muted">{text(line)}</span>' for line in differ)
            drawn.append(f"<figure><figcaption>{text(caption)}{lines}{notes}</figcaption>"
                         f"{svg.block(card, block, stack.depth if len(card.stacks) == 1 else 0)}</figure>")  # fmt: skip
    more = f'<p class="muted">and {left} more kinds of layers</p>' if left else ""
    if not card.stacks:
        more = '<p class="muted">No residual layers were found around these norms.</p>' if card.norms else ""
    blocks = f'<div class="blocks">{"".join(drawn)}</div>' if drawn else ""
    return f'<div class="recipe">{blocks}<div class="uses">{more}{_norms(card)}</div></div>'


def _norms(card: Card) -> str:
    rows = []
    casts = dict.fromkeys(use.cast for use in card.norms)
    for use in card.norms:
        part = {"feed_forward": "feed-forward", "cross_attention": "cross-attention"}.get(use.part, use.part)
        kind = "rms" if use.operator == "RMSNorm" else "ln"
        rows.append((
            f'<span class="tag {kind}-tag">{use.operator}</span>', text(f"{part}: {use.where}" if part else use.where),
            "" if len(use.layers) in (0, use.depth) else text(use.which), str(use.count),
            "?" if use.width is None else str(use.width), text(number(use.eps)),
            text(_weight(use)), text(use.cast) if len(casts) > 1 else "",
        ))  # fmt: skip
    headers = ("norm", "place", "layers", "count", "width", "eps", "weight", "computed in")
    same = f'<p class="muted">all computed in {text(next(iter(casts)))}</p>' if len(casts) == 1 else ""
    return table(headers, rows, (3, 4, 5), "norms", kind="short") + same


