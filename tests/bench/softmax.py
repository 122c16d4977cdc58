"""Softmaxes of attention in ONNX Runtime on the CPU: its own operators against those of `normfuse.ort`.

python -m tests.bench.softmax [--repeats 12] [--out FILE.json]

A model is a chain of 12 times `x = softmax(x + mask)`, or without the mask, over the last axis; the sessions take turns
in a random order. "causal" masks what comes later with the lowest number of the type, "none" nothing (its mask is 0).
`error` is the distance of one link to float64, in parts of the largest element.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper

import normfuse.ort
from tests.bench.common import save, table
from tests.bench.ort_ops import LENGTH, OURS, TYPES, session

SHAPES = ((16, 1, 512), (16, 16, 16), (16, 128, 128), (16, 512, 512), (4, 1024, 1024))
"""Heads, queries, keys."""
MASKS = ("without", "none", "causal")
STOCK = "ONNX Runtime"


def model(form: str, dtype: str, masked: bool, length: int) -> bytes:
    """A chain."""
    value, node = helper.make_tensor_value_info, helper.make_node
    half = dtype == "float16"
    nodes = [node("Cast", ["mask"], ["m"], to=1)] if half and masked and form == OURS else []
    for i in range(length):
        if form == OURS:
            name = ("add_softmax" if masked else "softmax") + "_of_f16" * half
            nodes.append(node(name, [f"x{i}", "m" if half else "mask"][: 1 + masked], [f"x{i + 1}"], domain=OURS))
            continue
        read = f"x{i}"
        if masked:
            read = f"s{i}"
            nodes.append(node("Add", [f"x{i}", "mask"], [read]))
        nodes.append(node("Softmax", [read], [f"x{i + 1}"], axis=-1))
    inputs = [value("x0", TYPES[dtype], ("h", "q", "k")), value("mask", TYPES[dtype], (1, "q", "k"))][: 1 + masked]
    graph = helper.make_graph(nodes, "chain", inputs, [value(f"x{length}", TYPES[dtype], ("h", "q", "k"))])
    opsets = [helper.make_opsetid(*o) for o in (("", 18), (OURS, 1))]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def feeds(shape: tuple[int, int, int], dtype: str, mask: str) -> dict[str, np.ndarray[Any, Any]]:
    """Scores, and what is added to them."""
    x = 3 * np.random.default_rng(1).standard_normal(shape).astype("f4")
    later = np.arange(shape[2])[None, :] > np.arange(shape[1])[:, None] + shape[2] - shape[1]
    added = np.where(later & (mask == "causal"), np.finfo(dtype).min, 0)[None]
    return {"x0": x.astype(dtype), **({} if mask == "without" else {"mask": added.astype(dtype)})}


def error(found: np.ndarray[Any, Any], given: dict[str, np.ndarray[Any, Any]]) -> float:
    """How far one link is from float64."""
    h = np.add.reduce(np.broadcast_arrays(*(a.astype(np.float64) for a in given.values())))
    e = np.exp(h - h.max(-1, keepdims=True))
    true = e / e.sum(-1, keepdims=True)
    return float(f"{np.abs(found - true).max() / true.max():.2g}")


def race(shape: tuple[int, int, int], dtype: str, mask: str, threads: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of a chain by form, and the error of one link."""
    given, masked = feeds(shape, dtype, mask), mask != "without"
    runs = {form: partial(session(model(form, dtype, masked, LENGTH), threads, "cpu").run, None, given)
            for form in (STOCK, OURS)}  # fmt: skip
    errors = {form: error(session(model(form, dtype, masked, 1), threads, "cpu").run(None, given)[0], given)
              for form in runs}  # fmt: skip
    seconds: dict[str, list[float]] = {form: [] for form in runs}
    few = max(2, 2**20 // int(np.prod(shape)))
    order = list(runs) * repeats
    random.Random(0).shuffle(order)
    for form in order:
        runs[form]()
        started = time.perf_counter()
        for _ in range(few):
            runs[form]()
        seconds[form].append(time.perf_counter() - started)
    ms = {form: round(statistics.median(found) / few * 1e3, 4) for form, found in seconds.items()}
    return {"shape": list(shape), "type": dtype, "mask": mask, "threads": threads, "ms": ms, "error": errors,
            "ratio": round(ms[OURS] / ms[STOCK], 3)}  # fmt: skip


def main() -> None:
    """Measure, print, and write the result if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    results: list[dict[str, Any]] = []
    for dtype in TYPES:
        for mask in MASKS:
            for shape in SHAPES:
                for threads in given.threads:
                    results.append(race(shape, dtype, mask, threads, given.repeats))
                    print(*results[-1].values(), flush=True)
    save(given.out, {"length": LENGTH, "instructions": normfuse.ort.instructions(), "chains": results})
    head = ["mask", "heads, queries, keys", "type", "threads", STOCK, OURS, "ratio"]
    rows = [[r["mask"], "x".join(map(str, r["shape"])), r["type"], str(r["threads"]),
             *(f"{t:.3f}" for t in r["ms"].values()), f"{r['ratio']:.2f}"] for r in results]  # fmt: skip
    print("\n" + table(head, rows, left=3))


if __name__ == "__main__":
    main()
