"""Residual addition and norm in ONNX Runtime: stock forms against the operators of `normfuse.ort`.

python -m tests.bench.ort_ops [--provider cuda] [--repeats 30] [--types float32 float16] [--out FILE.json]

A model is a chain of 12 times `s = x + residual; y = norm(s)`, y and s the next x and residual. The forms take turns in
a random order. Of float16 the Skip operators, and one of ours, normalise the sum before it is rounded. On a GPU inputs
and outputs stay there, and a run ends when the GPU has done it. `error` is the distance of one link's y to float64 on
rows with a mean of 100, in parts of the largest element.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

import normfuse.ort
from normfuse.sessions import PROVIDERS
from tests.bench.common import save, table

LENGTH = 12
SHAPES = {"cpu": ((1, 4096), (16, 4096), (128, 2048), (512, 2048), (512, 4096)),
          "cuda": ((1, 4096), (16, 4096), (512, 2048), (4096, 4096), (16384, 4096))}  # fmt: skip
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
OURS = "normfuse"
UNROUNDED = "normfuse, unrounded"


def casts(s: str, y: str, dtype: str) -> tuple[str, list[onnx.NodeProto], list[onnx.NodeProto]]:
    """The sum as a decomposed norm reads it, and the casts to there and back."""
    if dtype == "float32":
        return s, [], []
    return (f"{s}_wide", [helper.make_node("Cast", [s], [f"{s}_wide"], to=TensorProto.FLOAT)],
            [helper.make_node("Cast", [f"{y}_n"], [f"{y}_b"], to=TYPES[dtype])])  # fmt: skip


def rms_forms(i: int, dtype: str) -> Iterator[tuple[str, list[onnx.NodeProto]]]:
    """The nodes that make (y{i+1}, s{i+1}) of (y{i}, s{i}) by an RMSNorm, by form."""
    x, r, y, s = f"y{i}", f"s{i}", f"y{i + 1}", f"s{i + 1}"
    node = helper.make_node
    add = node("Add", [x, r], [s])
    wide, up, back = casts(s, y, dtype)
    yield "decomposed", [
        add, *up, node("Pow", [wide, "two"], [f"{s}_q"]), node("ReduceMean", [f"{s}_q", "last"], [f"{s}_m"]),
        node("Add", [f"{s}_m", "eps"], [f"{s}_e"]), node("Sqrt", [f"{s}_e"], [f"{s}_r"]),
        node("Reciprocal", [f"{s}_r"], [f"{s}_i"]), node("Mul", [wide, f"{s}_i"], [f"{y}_n"]), *back,
        node("Mul", [f"{y}_b" if back else f"{y}_n", "w"], [y]),
    ]  # fmt: skip
    yield "Add, RMSNormalization", [add, node("RMSNormalization", [s, "w"], [y], epsilon=1e-6)]
    yield "Add, SimplifiedLayerNormalization", [add, node("SimplifiedLayerNormalization", [s, "w"], [y], epsilon=1e-6)]
    yield "SkipSimplifiedLayerNormalization", [
        node("SkipSimplifiedLayerNormalization", [x, r, "w"], [y, "", "", s], domain="com.microsoft", epsilon=1e-6)]
    yield from ours("add_rms_norm", [x, r, "w"], [y, s], dtype)


def ours(name: str, inputs: list[str], outputs: list[str], dtype: str) -> Iterator[tuple[str, list[onnx.NodeProto]]]:
    """The operators of the library."""
    node = partial(helper.make_node, domain=OURS, eps=1e-6)
    if dtype == "float32":
        yield OURS, [node(name, inputs, outputs)]
        return
    yield OURS, [node(f"{name}_f16_in_f32_first", inputs, outputs)]
    wide = [*inputs[:2], *(f"{v}_wide" for v in inputs[2:])]
    yield UNROUNDED, [node(f"{name}_f16_in_f32_last_unrounded", wide, outputs)]


def layer_forms(i: int, dtype: str) -> Iterator[tuple[str, list[onnx.NodeProto]]]:
    """The same by a LayerNorm."""
    x, r, y, s = f"y{i}", f"s{i}", f"y{i + 1}", f"s{i + 1}"
    node = helper.make_node
    add = node("Add", [x, r], [s])
    wide, up, back = casts(s, y, dtype)
    yield "decomposed", [
        add, *up, node("ReduceMean", [wide, "last"], [f"{s}_c"]), node("Sub", [wide, f"{s}_c"], [f"{s}_d"]),
        node("Mul", [f"{s}_d", f"{s}_d"], [f"{s}_q"]), node("ReduceMean", [f"{s}_q", "last"], [f"{s}_m"]),
        node("Add", [f"{s}_m", "eps"], [f"{s}_e"]), node("Sqrt", [f"{s}_e"], [f"{s}_r"]),
        node("Div", [f"{s}_d", f"{s}_r"], [f"{y}_n"]), *back,
        node("Mul", [f"{y}_b" if back else f"{y}_n", "w"], [f"{y}_w"]), node("Add", [f"{y}_w", "b"], [y]),
    ]  # fmt: skip
    yield "Add, LayerNormalization", [add, node("LayerNormalization", [s, "w", "b"], [y], epsilon=1e-6)]
    yield "SkipLayerNormalization", [
        node("SkipLayerNormalization", [x, r, "w", "b"], [y, "", "", s], domain="com.microsoft", epsilon=1e-6)]
    yield from ours("add_layer_norm", [x, r, "w", "b"], [y, s], dtype)


FORMS = {"rms": rms_forms, "layer": layer_forms}


def constants(n: int, dtype: str) -> dict[str, Any]:
    """The constants of a chain by name."""
    rng, narrow = np.random.default_rng(0), np.dtype(dtype)
    w, b = rng.uniform(0.5, 1.5, n).astype(narrow), rng.standard_normal(n).astype(narrow)
    return {"w": w, "b": b, "w_wide": w.astype("f4"), "b_wide": b.astype("f4"),
            "two": np.float32(2), "eps": np.float32(1e-6), "last": np.array([-1])}  # fmt: skip


def model(nodes: list[onnx.NodeProto], length: int, shape: tuple[int, int], dtype: str) -> bytes:
    """A chain with its constants."""
    value = helper.make_tensor_value_info
    dims, kind = (1, *shape), TYPES[dtype]
    read = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes, "chain", [value(n, kind, dims) for n in ("y0", "s0")],
        [value(f"{n}{length}", kind, dims) for n in "ys"],
        [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in constants(shape[1], dtype).items()
         if n in read])  # fmt: skip
    opsets = [helper.make_opsetid(*o) for o in (("", 23), ("com.microsoft", 1), (OURS, 1))]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def session(data: bytes, threads: int, provider: str) -> Any:
    """A session with our operators."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or it takes a core from the next one's turn
    normfuse.ort.register(options, None, provider)
    return ort.InferenceSession(data, options, providers=[PROVIDERS[provider]])


def runner(made: Any, feeds: dict[str, Any], provider: str) -> Callable[[], object]:
    """A run of a session; on a GPU nothing is copied there or back."""
    if provider == "cpu":
        return partial(made.run, None, feeds)
    binding = made.io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, provider, 0))
    for out in made.get_outputs():
        binding.bind_output(out.name, provider)
    return partial(made.run_with_iobinding, binding)


def error(made: Any, kind: str, dtype: str, shape: tuple[int, int], form: str) -> float:
    """How far one link is from float64, of the sum as it normalises it."""
    rng, known = np.random.default_rng(1), constants(shape[1], dtype)
    x, r = (rng.standard_normal((1, *shape)).astype(dtype) for _ in range(2))
    x += np.array(100, dtype)
    found = made.run(None, {"y0": x, "s0": r})[0].astype(np.float64)
    wide = form.startswith("Skip") or form == UNROUNDED
    s = x.astype(np.float64) + r if wide else (x + r).astype(np.float64)
    s = s - s.mean(-1, keepdims=True) if kind == "layer" else s
    true = s / np.sqrt((s * s).mean(-1, keepdims=True) + 1e-6) * known["w"].astype(np.float64)
    true = true + known["b"].astype(np.float64) if kind == "layer" else true
    return float(f"{np.abs(found - true).max() / np.abs(true).max():.2g}")


def race(kind: str, dtype: str, shape: tuple[int, int], threads: int, repeats: int, provider: str) -> dict[str, Any]:
    """Milliseconds of a chain, by form, and the error of one link."""
    rng = np.random.default_rng(1)
    feeds = {n: rng.standard_normal((1, *shape)).astype(dtype) for n in ("y0", "s0")}
    forms: dict[str, list[onnx.NodeProto]] = {}
    for i in range(LENGTH):
        for name, nodes in FORMS[kind](i, dtype):
            forms.setdefault(name, []).extend(nodes)
    links = dict(FORMS[kind](0, dtype))
    runs: dict[str, Callable[[], object]] = {}
    errors: dict[str, float] = {}
    for name, nodes in forms.items():
        try:
            made = session(model(nodes, LENGTH, shape, dtype), threads, provider)
            runs[name] = runner(made, feeds, provider)
            link = session(model(links[name], 1, shape, dtype), threads, provider)
            errors[name] = error(link, kind, dtype, shape, name)
        except Exception as why:  # a form that this ONNX Runtime lacks
            print(f"{name}, {dtype}: {str(why).splitlines()[0]}")
            runs.pop(name, None)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    few = max(2, 4096 * 32 // (shape[0] * shape[1])) if provider == "cpu" else 20
    order = list(runs) * (2 * repeats if few > 8 else repeats)
    random.Random(0).shuffle(order)  # in a fixed order a form can keep meeting the same other job of the machine
    for name in order:
        runs[name]()
        started = time.perf_counter()
        for _ in range(few):
            runs[name]()
        seconds[name].append(time.perf_counter() - started)
    ms = {name: round(statistics.median(found) / few * 1e3, 4) for name, found in seconds.items()}
    best = min(v for name, v in ms.items() if name not in (OURS, UNROUNDED, "decomposed"))
    ratios = {"to_best_stock": round(ms[OURS] / best, 3), "to_decomposed": round(ms[OURS] / ms["decomposed"], 3)}
    return {"norm": kind, "type": dtype, "rows": shape[0], "size": shape[1], "threads": threads, "ms": ms,
            "error": errors} | ratios  # fmt: skip


def main() -> None:
    """Measure, print, and write the result if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=list(TYPES))
    parser.add_argument("--norms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--provider", default="cpu", choices=PROVIDERS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = torch.cuda.get_device_name() if given.provider == "cuda" else None
    about = {"provider": given.provider, "device": device, "length": LENGTH,
             "instructions": normfuse.ort.instructions()}  # fmt: skip
    results: list[dict[str, Any]] = []
    for kind in given.norms:
        for dtype in given.types:
            for shape in SHAPES[given.provider]:
                for threads in given.threads if given.provider == "cpu" else [1]:
                    results.append(race(kind, dtype, shape, threads, given.repeats, given.provider))
                    found = results[-1]
                    print(kind, dtype, *shape, threads, found["ms"], found["error"], found["to_best_stock"],
                          found["to_decomposed"], flush=True)  # fmt: skip
            save(given.out, about | {"chains": results})  # at once: the next may run out of time
    head = ["norm", "type", "rows", "size", "threads", "ours, ms", "to the best stock form", "to decomposed"]
    columns = ("norm", "type", "rows", "size", "threads", "to_best_stock", "to_decomposed")
    lines = [[r[name] for name in columns] for r in results]
    print("\n" + table(head, [[*a[:5], r["ms"][OURS], *a[5:]] for r, a in zip(results, lines, strict=True)], left=2))


if __name__ == "__main__":
    main()
