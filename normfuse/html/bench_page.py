"""What `normfuse bench --report` writes: a box for each model and provider on one scale, and the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normfuse.cli_bench import about, ms, share, size, verdict
from normfuse.cli_env import version
from normfuse.html import svg
from normfuse.html.page import document, many, name, section, table, text

WIDTH, LEFT, ROW = 760.0, 150.0, 46.0


def bench_page(found: dict[str, Any]) -> str:
    """The page."""
    models, ratios = found["models"], found["ratio"] or {}
    names = [Path(model["path"]).name for model in models]
    title = " and ".join(names)
    head = (f'<header><p class="kicker">NormFuse {text(version("normfuse") or "")}: latency</p>'
            f"<h1>{' and '.join(map(name, names))}</h1>")  # fmt: skip
    for provider, ratio in ratios.items():
        kind = "warn" if ratio["within_noise"] else "good" if ratio["median"] < 1 else "bad"
        head += f'<p class="verdict {kind}">{text(verdict(provider, ratio))}</p>'
    head += "".join(f'<p class="muted">{text(line)}</p>' for line in [about(found), *found["notes"]]) + "</header>"
    rows = [(letter, model, provider, run) for letter, model in zip("AB", models, strict=False)
            for provider, run in model["providers"].items()]  # fmt: skip
    cells = [
        (letter, name(Path(model["path"]).name), provider, *(ms(run["milliseconds"][k]) for k in
         ("min", "q1", "median", "q3")), str(run["rounds"]), share(run), size(run),
         "NormFuse's library" if model["operators"] else "") for letter, model, provider, run in rows
    ]  # fmt: skip
    headers = ("", "model", "provider", "least ms", "lower quartile", "median", "upper quartile", "rounds", "in norms",
               "memory", "norms by")  # fmt: skip
    legend = ('<p class="muted">Half of the rounds lie within the box, the line in it is the median, the line to its '
              "left ends at the fastest round. Memory: how much a fresh process grows at its peak, in resident "
              "memory, as it loads the model and runs it on the CPU.</p>")  # fmt: skip
    body = section("latency", "Latency", f'<div class="scroll">{boxes(rows)}</div>{legend}')
    numbers = section("numbers", f"{many(len(rows), 'measurement')}", table(headers, cells, (3, 4, 5, 6, 7, 8, 9)))
    return document(f"{title}: latency", f"{head}{body}{numbers}")


def boxes(rows: list[tuple[str, dict[str, Any], str, dict[str, Any]]]) -> str:
    """Least, quartiles and median, one below the other, in milliseconds from 0."""
    marks = svg.ticks(max(run["milliseconds"]["q3"] for *_, run in rows))
    out = svg.Drawing()
    height = ROW * len(rows)

    def place(value: float) -> float:
        return LEFT + (WIDTH - LEFT - 24) * value / marks[-1]

    for mark in marks:
        out.line([(place(mark), 4), (place(mark), height + 4)], "grid")
        out.text(place(mark), height + 20, f"{mark:g}", "small mid")
    for i, (letter, _, provider, run) in enumerate(rows):
        t, y = run["milliseconds"], ROW * i + 14
        out.text(8, y + 17, f"{letter}, {provider}, {ms(t['median'])} ms")
        out.line([(place(t["min"]), y + 12), (place(t["q1"]), y + 12)], "wire")
        kind = "bar-before" if letter == "A" else "bar-after"
        out.box(place(t["q1"]), y, max(2, place(t["q3"]) - place(t["q1"])), 24, kind, 3)
        out.line([(place(t["median"]), y - 4), (place(t["median"]), y + 28)], "stream")
    out.text(WIDTH - 8, height + 36, "milliseconds", "small end")
    medians = (f"{letter} on {provider}: {ms(run['milliseconds']['median'])} ms" for letter, _, provider, run in rows)
    return svg.svg(out, WIDTH, height + 42, "; ".join(medians), "plot")
