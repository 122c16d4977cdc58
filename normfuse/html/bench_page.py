"""What `normfuse bench --report` writes: a box for each model and provider on one scale, and the numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from normfuse.cli_bench import about, ms, rate, share, size, verdict
from normfuse.cli_env import version
from normfuse.html import svg
from normfuse.html.page import document, many, name, section, table, text

LEFT, RIGHT, ROW, BAR = 0.02, 0.93, 50.0, 18.0


def bench_page(found: dict[str, Any]) -> str:
    """The page."""
    names = [Path(model["path"]).name for model in found["models"]]
    title = " and ".join(names)
    head = (f'<header><p class="kicker">NormFuse {text(version("normfuse") or "")}: latency</p>'
            f"<h1>{' and '.join(map(name, names))}</h1>{verdicts(found)}</header>")  # fmt: skip
    rows = measurements(found)
    body = section("latency", "Latency", latency(found))
    rates = bandwidth(found)
    body += section("bandwidth", "Bandwidth of the norms", rates) if rates else ""
    body += section("numbers", many(len(rows), "measurement"), numbers(found))
    return document(f"{title}: latency", head + body)


Row = tuple[str, dict[str, Any], str, dict[str, Any]]
"""What a model is called, the model, the provider, and what was measured."""


def measurements(found: dict[str, Any], letters: Sequence[str] = "AB") -> list[Row]:
    """What was measured, by model and provider."""
    return [(letter, model, provider, run) for letter, model in zip(letters, found["models"], strict=False)
            for provider, run in model["providers"].items()]  # fmt: skip


def verdicts(found: dict[str, Any], a: str = "A", b: str = "B") -> str:
    """The ratio of two models, and on what they ran."""
    out = ""
    for provider, ratio in (found["ratio"] or {}).items():
        kind = "warn" if ratio["within_noise"] else "good" if ratio["median"] < 1 else "bad"
        out += f'<p class="verdict {kind}">{text(verdict(provider, ratio, a, b))}</p>'
    return out + "".join(f'<p class="muted">{text(line)}</p>' for line in [about(found), *found["notes"]])


def latency(found: dict[str, Any], letters: Sequence[str] = "AB") -> str:
    """A box for each model and provider."""
    legend = ("Half of the rounds lie within the box, the line in it is the median, the line to its left ends at the "
              "fastest round.")  # fmt: skip
    return f'{boxes(measurements(found, letters))}<p class="muted">{legend}</p>'


def bandwidth(found: dict[str, Any], letters: Sequence[str] = "AB") -> str:
    """How fast norms move their bytes, beside what a copy reaches; nothing where that is not known."""
    limit = found["copy_gb_per_s"]
    rates = [(letter, run["norm_gb_per_s"]) for letter, _, _, run in measurements(found, letters)]
    known = [(letter, value) for letter, value in rates if value is not None]
    if limit is None or not known:
        return ""
    words = ("GB/s on the CPU, where each tensor that a norm has to read or write counts once. The limit is what one "
             "thread reaches that copies as many bytes as a norm moves.")  # fmt: skip
    return f'{bars([*known, ("a copy", limit)], letters)}<p class="muted">{words}</p>'


def numbers(found: dict[str, Any], letters: Sequence[str] = "AB") -> str:
    """The numbers as a table."""
    cells = [
        (letter, name(Path(model["path"]).name), provider, *(ms(run["milliseconds"][k]) for k in
         ("min", "q1", "median", "q3")), str(run["rounds"]), share(run), rate(run["norm_gb_per_s"]), size(run),
         "NormFuse's library" if model["operators"] else "")
        for letter, model, provider, run in measurements(found, letters)
    ]  # fmt: skip
    headers = ("", "model", "provider", "least ms", "lower quartile", "median", "upper quartile", "rounds", "in norms",
               "norms move", "memory", "norms by")  # fmt: skip
    memory = ("Memory: how much a fresh process grows at its peak, in resident memory, as it loads the model and runs "
              "it on the CPU.")  # fmt: skip
    return table(headers, cells, (3, 4, 5, 6, 7, 8, 9, 10), "latency") + f'<p class="muted">{memory}</p>'


def bars(rows: Sequence[tuple[str, float]], letters: Sequence[str]) -> str:
    """A bar for each value, in GB/s; the last one is the limit, drawn through all."""
    out, height = svg.Drawing(), ROW * len(rows)
    place = _axis(out, svg.ticks(max(value for _, value in rows)), height, "GB/s")
    limit = svg.part(place(rows[-1][1]))
    for i, (label, value) in enumerate(rows):
        y = ROW * i + 14
        out.text(svg.part(LEFT + 0.008), y, f"{label}, {value:.3g} GB/s")
        kind = "grid-bar" if i == len(rows) - 1 else "bar-before" if label == letters[0] else "bar-after"
        out.box(svg.part(LEFT), y + 7, svg.part(max(0.004, place(value) - LEFT)), BAR, kind, 3)
    out.rule(limit, 4, limit, height + 4, "limit")
    return svg.plot(out, height + 26, "; ".join(f"{label}: {value:.3g} GB/s" for label, value in rows))


def boxes(rows: list[Row]) -> str:
    """Least, quartiles and median, one below the other, in milliseconds from 0."""
    out, height = svg.Drawing(), ROW * len(rows)
    place = _axis(out, svg.ticks(max(run["milliseconds"]["q3"] for *_, run in rows)), height, "ms")
    for i, (letter, _, provider, run) in enumerate(rows):
        t, y = run["milliseconds"], ROW * i + 14
        least, low, middle, high = (place(t[key]) for key in ("min", "q1", "median", "q3"))
        out.text(svg.part(LEFT + 0.008), y, f"{letter}, {provider}, {ms(t['median'])} ms")
        out.rule(svg.part(least), y + 7 + BAR / 2, svg.part(low), y + 7 + BAR / 2, "wire")
        kind = "bar-before" if letter == rows[0][0] else "bar-after"
        out.box(svg.part(low), y + 7, svg.part(max(0.004, high - low)), BAR, kind, 3)
        out.rule(svg.part(middle), y + 4, svg.part(middle), y + BAR + 10, "stream")
    medians = (f"{letter} on {provider}: {ms(run['milliseconds']['median'])} ms" for letter, _, provider, run in rows)
    return svg.plot(out, height + 26, "; ".join(medians))


def _axis(out: svg.Drawing, marks: Sequence[float], height: float, unit: str) -> Callable[[float], float]:
    """Draw the scale, and give back at which share of the width a value stands on it."""

    def place(value: float) -> float:
        return LEFT + (RIGHT - LEFT) * value / marks[-1]

    for mark in marks:
        x = svg.part(place(mark))
        out.rule(x, 4, x, height + 4, "grid")
        out.text(x, height + 20, f"{mark:g}" + f" {unit}" * (mark == marks[-1]), "small mid")
    return place
