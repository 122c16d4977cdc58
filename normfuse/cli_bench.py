"""`normfuse bench`: what was measured, on the terminal, as JSON and as a page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from normfuse.bench import How, bench
from normfuse.cli import DONE, Outcome
from normfuse.cli_print import Block, Table, progress
from normfuse.errors import InputError, path_of
from normfuse.html import page

HEADERS = ("", "model", "provider", "median ms", "half of the rounds", "least", "rounds", "in norms", "norms move",
           "memory", "norms by")  # fmt: skip


def bench_models(args: argparse.Namespace) -> Outcome:
    """Measure, and write the report if asked. Raises `InputError` for options that mean nothing."""
    paths = [path for path in (args.a, args.b) if path is not None]
    how = How(args.threads, args.rounds, sizes(args.size), args.inputs, not args.no_library)
    if args.report is not None:
        page.check(path_of(args.report, "--report"), [Path(path) for path in paths], args.overwrite)
    found = measure(paths, how, args.quiet)
    blocks = bench_blocks(found, args.quiet)
    if args.report is not None:
        from normfuse.html.bench_page import bench_page

        page.write(bench_page(found), Path(args.report), [Path(path) for path in paths], args.overwrite)
        if not args.quiet:
            blocks.append(f"wrote {args.report}")
    return Outcome(DONE, found, blocks)


def sizes(given: list[str]) -> dict[str, int]:
    """The sizes of --size by name. Raises `InputError` for what is none."""
    found = dict[str, int]()
    for name, n in map(_size, given):
        if name in found:
            raise InputError(f"--size {name}={n}: {name} is {found[name]} already; give each size once")
        found[name] = n
    return found


def _size(text: str) -> tuple[str, int]:
    name, _, number = text.rpartition("=")
    if not name or not number.isdecimal() or len(number) > 18 or int(number) < 1:
        raise InputError(f"--size {text}: give a name and a size, such as batch=4")
    return name, int(number)


def bench_blocks(found: dict[str, Any], quiet: bool) -> list[Block]:
    """A row for each model and provider, and the ratio of two models."""
    models = found["models"]
    ratios: list[Block] = [verdict(provider, ratio) for provider, ratio in (found["ratio"] or {}).items()]
    if quiet:
        return ratios or [f"{provider}: {ms(run['milliseconds']['median'])} ms"
                          for provider, run in models[0]["providers"].items()]  # fmt: skip
    rows = []
    for letter, model in zip("AB" if len(models) == 2 else " ", models, strict=True):
        for provider, run in model["providers"].items():
            t = run["milliseconds"]
            rows.append((letter.strip(), model["path"], provider, ms(t["median"]), f"{ms(t['q1'])} to {ms(t['q3'])}",
                         ms(t["min"]), str(run["rounds"]), share(run), rate(run["norm_gb_per_s"]), size(run),
                         "NormFuse's library" if model["operators"] else ""))  # fmt: skip
    blocks: list[Block] = [about(found), "", Table(HEADERS, rows)]
    return blocks + [f"note: {note}" for note in [*found["notes"], *copying(found)]] + ratios


def measure(paths: list[str], how: How, quiet: bool) -> dict[str, Any]:
    """Run `bench` with a bar of progress."""
    with progress(not quiet) as advance:
        return bench(paths, how, advance)


def copying(found: dict[str, Any]) -> list[str]:
    """What bounds the rate at which norms move bytes."""
    limit = found["copy_gb_per_s"]
    return [] if limit is None else [f"one thread that copies as many bytes as a norm moves {rate(limit)}"]


def about(found: dict[str, Any]) -> str:
    """The runtime, the threads and the inputs."""
    threads = found["threads"]
    inputs = ", ".join(f"{n} {'x'.join(map(str, i['shape'])) or 'scalar'} {i['dtype']}"
                       for n, i in found["inputs"].items())  # fmt: skip
    counted = f"{threads} thread{'s' * (threads != 1)}" if threads else "its own number of threads"
    return f"ONNX Runtime {found['onnxruntime']}, {counted}; inputs: {inputs or 'none'}"


def verdict(provider: str, ratio: dict[str, Any], a: str = "A", b: str = "B") -> str:
    """The ratio of two models in words."""
    text = f"{provider}: {b} takes {ratio['median']:.2f} of {a} ({ratio['q1']:.2f}-{ratio['q3']:.2f})"
    return text + ("; the difference is within noise" if ratio["within_noise"] else "")


def ms(value: float) -> str:
    """Milliseconds, three digits."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def share(run: dict[str, Any]) -> str:
    """The share of time in norms."""
    return "not known" if run["norm_share"] is None else f"{run['norm_share']:.0%}"


def rate(value: float | None) -> str:
    """Bytes per second."""
    return "not known" if value is None else f"{value:.3g} GB/s"


def size(run: dict[str, Any]) -> str:
    """The growth of a process in MiB."""
    found = run["memory_bytes"]
    return "not known" if found is None else f"{found / 2**20:.1f} MiB"
