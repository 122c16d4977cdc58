"""What the benchmarks share: versions, tables, turns, and a result file without dates."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxsim", "transformers", "numpy", "normfuse")


def environment() -> dict[str, Any]:
    """The versions and the machine that a result belongs to."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    try:
        found["onnxruntime"] = __import__("onnxruntime").__version__
    except ImportError:  # not every benchmark needs it
        found["onnxruntime"] = None
    return found | {"cpu": _cpu(), "cpus": os.cpu_count()}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def turns(jobs: Mapping[str, Callable[[], object]], repeats: int,
          clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:  # fmt: skip
    """Seconds of each job, the jobs taking turns so that a busy machine disturbs all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            gc.collect()  # what the job before left is not this one's to clear
            started = clock()
            job()
            seconds[name].append(clock() - started)
    return seconds


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Least and median, as they go into a result file."""
    return {"min": round(min(seconds), 4), "median": round(statistics.median(seconds), 4)}


def table(head: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> str:
    """Aligned text; the first `left` columns are words, the others numbers."""
    cells = [[str(c) for c in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        words = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(words).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * w for w in widths), *map(line, cells[1:])])


def merged(path: Path | None, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]],
           keys: Sequence[str]) -> dict[str, Any]:  # fmt: skip
    """A result of `about` and the rows "models", to which come those rows of the file that were measured with the same
    versions under the same conditions and are not measured again: those with other values of `keys`."""
    about = json.loads(json.dumps(about))  # as it will be read: keys that are numbers are text there
    old = json.loads(path.read_text()) if path is not None and path.exists() else {}
    new = {tuple(row[key] for key in keys) for row in rows}
    same = all(old.get(name) == value for name, value in {**about, "environment": environment()}.items())
    kept = old.get("models", []) if same else []
    return {**about, "models": [r for r in kept if tuple(r[key] for key in keys) not in new] + [*rows]}


def save(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write a result with its environment; nothing without a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"environment": environment(), **result}, indent=1) + "\n")
        print(f"written: {path}")
