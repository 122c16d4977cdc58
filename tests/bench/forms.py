"""What a residual addition and a norm cost in ONNX Runtime on the CPU, in each form there is, by version of it; and
what operators of float16 cost that it has in float32 only.

python -m tests.bench.forms [--parts chains operators sums scales convolutions] [--out FILE.json]

Chains of 12, one thread. The forms: the exporter's own spelling of the norm, which ONNX Runtime may fuse; an Add and
the norm as one operator (where the version has no RMSNormalization its own name for it, SimplifiedLayerNormalization);
the contrib operators that take in the addition; and, of half types, what these compute taken apart: the same addition
and operator in float32, between casts. `error` is the largest distance to float64 on rows with a mean of
100, in parts of the largest element. Under `operators`, those of `normfuse.targets.WIDE` in float16, as they are and in
float32 between casts, on rows of 512 elements. Under `sums`, chains of LayerNorms behind an addition (post-norm) that
is written as Add, of which ONNX Runtime makes SkipLayerNormalization, and as Sum. Under `scales`, the scores of
attention in float16, 16 heads of 64: a product and the number behind it, and FusedMatMul. Under `convolutions`, chains
of depthwise and pointwise ones, each multiplied by a number and added to one, as Paddle2ONNX writes it, and as ONNX
Runtime takes them into the weights: both second, the latter for each channel. Each run adds the installed version to
the file, from which `normfuse.targets` is made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from normfuse.targets import WIDE
from tests.bench.common import ROOT, environment, table

RESULT = ROOT / "tests/bench/results/forms.json"
CHAIN, EPS = 12, 1e-5
SHAPES = ((1, 1024), (16, 1024), (128, 1024), (512, 2048))
TYPES: dict[str, tuple[Any, int]] = {
    "float32": (np.float32, TensorProto.FLOAT), "float16": (np.float16, TensorProto.FLOAT16),
}  # fmt: skip
PARTS = ("chains", "operators", "sums", "scales", "convolutions")
IMAGES = ((16, 24, 160), (64, 12, 160), (256, 6, 80))
"""Channels, height and width."""
FORMS = ("spelled out", "add, norm", "skip", "apart")
Array = npt.NDArray[Any]


class Chain:
    """A chain of residual norms as a model in the making."""

    def __init__(self, kind: str, n: int, dtype: str, length: int) -> None:
        self.kind, self.n, self.layer = kind, n, kind == "layer_norm"
        self.type, self.proto = TYPES[dtype]
        self.length = length
        rng = np.random.default_rng(0)
        self.weights = [(1 + rng.standard_normal(n) / 10).astype(self.type) for _ in range(length)]
        self.biases = [(rng.standard_normal(n) / 10).astype(self.type) for _ in range(length)]
        self.nodes: list[onnx.NodeProto] = []

    def op(self, name: str, inputs: str, outputs: str, domain: str = "", **attributes: Any) -> None:
        """A node; a dash stands for an output that is not wanted."""
        names = ["" if o == "-" else o for o in outputs.split()]
        self.nodes.append(helper.make_node(name, inputs.split(), names, domain=domain, **attributes))

    def model(self, form: str, opset: int) -> onnx.ModelProto:
        """The chain in one form: y is normalised, then added to the stream as the next summand."""
        self.nodes = []
        s, f = "x", "r"
        for i in range(self.length):
            parameters = f"w{i} b{i}" if self.layer else f"w{i}"
            if form == "skip":
                name = "SkipLayerNormalization" if self.layer else "SkipSimplifiedLayerNormalization"
                self.op(name, f"{s} {f} {parameters}", f"y{i} - - s{i}", "com.microsoft", epsilon=EPS)
            elif form == "apart":
                wide = [f"{v}_wide{i}" for v in (s, f, *parameters.split())]
                for v in wide:
                    self.op("Cast", v.partition("_")[0], v, to=TensorProto.FLOAT)
                self.op("Add", " ".join(wide[:2]), f"t{i}")
                self.normed(opset, " ".join([f"t{i}", *wide[2:]]), f"z{i}")
                for v, to in ((f"z{i}", f"y{i}"), (f"t{i}", f"s{i}")):
                    self.op("Cast", v, to, to=self.proto)
            else:
                self.op("Add", f"{s} {f}", f"s{i}")
                if form == "spelled out":
                    self.spell(i)
                else:
                    self.normed(opset, f"s{i} {parameters}", f"y{i}")
            s, f = f"s{i}", f"y{i}"
        if self.length > 1:
            self.op("Add", f"{s} {f}", "y")
        else:
            self.op("Identity", f, "y")
        arrays = {"last": np.array([-1]), "two": np.array(2.0, "f4"), "eps": np.array(EPS, "f4")}
        arrays |= {f"w{i}": w for i, w in enumerate(self.weights)} | {f"b{i}": b for i, b in enumerate(self.biases)}
        read = {name for node in self.nodes for name in node.input}
        tensors = [numpy_helper.from_array(a, k) for k, a in arrays.items() if k in read]
        values = [helper.make_tensor_value_info(v, self.proto, ["batch", "rows", self.n]) for v in "xry"]
        graph = helper.make_graph(self.nodes, "chain", values[:2], values[2:], tensors)
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def normed(self, opset: int, inputs: str, output: str) -> None:
        """The operator for the norm."""
        if self.layer:
            self.op("LayerNormalization", inputs, output, axis=-1, epsilon=EPS)
        else:
            name = "RMSNormalization" if opset >= 23 else "SimplifiedLayerNormalization"
            self.op(name, inputs, output, axis=-1, epsilon=EPS, stash_type=1)

    def spell(self, i: int) -> None:
        """The norm of s as torch's exporter writes it for a model that computes in float32."""
        half, h = self.proto != TensorProto.FLOAT, f"s{i}"
        if half:
            self.op("Cast", h, f"c{i}", to=TensorProto.FLOAT)
            h = f"c{i}"
        if self.layer:
            self.op("ReduceMean", f"{h} last", f"m{i}")
            self.op("Sub", f"{h} m{i}", f"d{i}")
            h = f"d{i}"
        self.op("Pow", f"{h} two", f"q{i}")
        self.op("ReduceMean", f"q{i} last", f"v{i}")
        self.op("Add", f"v{i} eps", f"e{i}")
        self.op("Sqrt", f"e{i}", f"t{i}")
        self.op("Reciprocal", f"t{i}", f"u{i}")
        self.op("Mul", f"{h} u{i}", f"n{i}")
        n = f"n{i}"
        if half:
            self.op("Cast", n, f"h{i}", to=self.proto)
            n = f"h{i}"
        self.op("Mul", f"w{i} {n}", f"z{i}" if self.layer else f"y{i}")
        if self.layer:
            self.op("Add", f"z{i} b{i}", f"y{i}")

    def true(self, x: Array, r: Array, form: str) -> Array:
        """The first norm in float64, of the sum as the form rounds it."""
        wide = form in ("skip", "apart")
        s = x.astype(np.float64) + r if wide else (x + r).astype(np.float64)
        s = s - s.mean(-1, keepdims=True) if self.layer else s
        y: Array = s / np.sqrt((s * s).mean(-1, keepdims=True) + EPS) * self.weights[0].astype(np.float64)
        return y + self.biases[0].astype(np.float64) if self.layer else y


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    """A session as users make it, on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def measure(kind: str, dtype: str, m: int, n: int, opset: int, repeats: int) -> dict[str, dict[str, float]]:
    """Microseconds a norm, with its addition, and the error of each form."""
    chain, one = Chain(kind, n, dtype, CHAIN), Chain(kind, n, dtype, 1)
    rng = np.random.default_rng(1)
    x, r = (rng.standard_normal((1, m, n)).astype(chain.type) for _ in range(2))
    forms = FORMS if dtype == "float16" else FORMS[:-1]
    sessions = {form: session(chain.model(form, opset)) for form in forms}
    times: dict[str, list[float]] = {form: [] for form in forms}
    for i in range(repeats + 3):
        for form in forms if i % 2 else forms[::-1]:
            started = time.perf_counter()
            sessions[form].run(None, {"x": x, "r": r})
            times[form].append((time.perf_counter() - started) / CHAIN * 1e6)
    out = {}
    far = x + np.array(100, chain.type)
    for form in forms:
        found = session(one.model(form, opset)).run(None, {"x": far, "r": r})[0].astype(np.float64)
        true = one.true(far, r, form)
        low, middle, high = statistics.quantiles(times[form][3:], n=4)
        out[form] = {"us": round(middle, 2), "q1": round(low, 2), "q3": round(high, 2),
                     "error": float(f"{np.abs(found - true).max() / np.abs(true).max():.2g}")}  # fmt: skip
    return out


def operator(op: str, m: int, repeats: int) -> dict[str, Any]:
    """Microseconds of an operator of float16, as it is and in float32 between casts."""
    low, high = WIDE[op]
    axis = {"axis": -1} if op.endswith("oftmax") else {}
    chains = {"us": ((op, axis),), "float32 us": (("Cast", {"to": TensorProto.FLOAT}), (op, axis),
                                                  ("Cast", {"to": TensorProto.FLOAT16}))}  # fmt: skip
    sessions = {}
    for name, chain in chains.items():
        nodes = [helper.make_node(kind, [f"v{i}"], [f"v{i + 1}"], **given) for i, (kind, given) in enumerate(chain)]
        ends = [helper.make_tensor_value_info(v, TensorProto.FLOAT16, ["rows", 512]) for v in ("v0", f"v{len(chain)}")]
        opsets = [helper.make_opsetid("", max(low, min(high, 18)))]
        graph = helper.make_graph(nodes, "one", ends[:1], ends[1:])
        sessions[name] = session(helper.make_model(graph, opset_imports=opsets, ir_version=9))
    x = np.random.default_rng(1).standard_normal((m, 512)).astype(np.float16)
    times: dict[str, list[float]] = {name: [] for name in chains}
    for i in range(repeats + 3):
        for name in sorted(chains, reverse=bool(i % 2)):
            started = time.perf_counter()
            sessions[name].run(None, {"v0": x})
            times[name].append((time.perf_counter() - started) * 1e6)
    middle = {name: round(statistics.median(found[3:]), 2) for name, found in times.items()}
    return {"operator": op, "rows": m, **middle}


def sums(m: int, n: int, repeats: int) -> dict[str, Any]:
    """Microseconds of an addition and a LayerNorm of float32, which alone reads it, by how the addition is written."""
    chain = Chain("layer_norm", n, "float32", CHAIN)
    rng = np.random.default_rng(1)
    feeds = {name: rng.standard_normal((1, m, n)).astype(np.float32) for name in "xr"}
    sessions, times = {}, dict[str, list[float]]()
    for op in ("Add", "Sum"):
        made = chain.model("add, norm", 18)
        del made.graph.node[:]
        chain.nodes, last = [], "x"
        for i in range(CHAIN):
            chain.op(op, f"{last} r", f"s{i}")
            last = f"n{i}" if i < CHAIN - 1 else "y"
            chain.normed(18, f"s{i} w{i} b{i}", last)
        made.graph.node.extend(chain.nodes)
        sessions[op], times[op] = session(made), []
    for i in range(repeats + 3):
        for op in sorted(sessions, reverse=bool(i % 2)):
            started = time.perf_counter()
            sessions[op].run(None, feeds)
            times[op].append((time.perf_counter() - started) / CHAIN * 1e6)
    middle = {f"{op} us": round(statistics.median(found[3:]), 2) for op, found in times.items()}
    return {"cpu": environment()["cpu"], "rows": m, "n": n, **middle}


def scales(tokens: int, repeats: int) -> dict[str, Any]:
    """Microseconds of the scores of attention in float16, as a product and a factor and as one operator.

    Two of them with the same factor, as the layers of a model have: of a single one ONNX Runtime makes one operator.
    """
    node, contrib = helper.make_node, dict[str, Any](domain="com.microsoft", alpha=0.125)
    chains = {"MatMul, Mul us": [one for i in "01" for one in (node("MatMul", [f"q{i}", f"k{i}"], [f"s{i}"]),
                                                               node("Mul", [f"s{i}", "c"], [f"y{i}"]))],
              "FusedMatMul us": [node("FusedMatMul", [f"q{i}", f"k{i}"], [f"y{i}"], **contrib)
                                 for i in "01"]}  # fmt: skip
    sides = {"q": [tokens, 64], "k": [64, tokens], "y": [tokens, tokens]}
    shapes = {f"{name}{i}": [1, 16, *side] for name, side in sides.items() for i in "01"}
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name, shape in shapes.items()]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    rng = np.random.default_rng(1)
    feeds = {name: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items() if "y" not in name}
    sessions, times = {}, dict[str, list[float]]()
    for name, nodes in chains.items():
        held = [numpy_helper.from_array(np.array(0.125, np.float16), "c")] if len(nodes) > 1 else []
        graph = helper.make_graph(nodes, "two", ends[:4], ends[4:], held)
        sessions[name], times[name] = session(helper.make_model(graph, opset_imports=opsets, ir_version=9)), []
    for i in range(repeats + 3):
        for name in sorted(sessions, reverse=bool(i % 2)):
            started = time.perf_counter()
            sessions[name].run(None, feeds)
            times[name].append((time.perf_counter() - started) / 2 * 1e6)
    middle = {name: round(statistics.median(found[3:]), 2) for name, found in times.items()}
    return {"cpu": environment()["cpu"], "tokens": tokens, **middle}


def convolutions(channels: int, height: int, width: int, repeats: int) -> dict[str, Any]:
    """Microseconds of a convolution and two constants behind it, in two spellings."""
    rng = np.random.default_rng(1)
    sessions, times = {}, dict[str, list[float]]()
    for name in ("one number", "taken in"):
        taken, nodes, held, x = name == "taken in", list[Any](), dict[str, Any](), "x"
        for i in range(CHAIN):
            groups = channels if i % 2 else 1
            side = 3 if i % 2 else 1
            held[f"w{i}"] = rng.standard_normal((channels, channels // groups, side, side)) / (channels / groups) ** 0.5
            held |= {f"b{i}": np.zeros(channels), f"s{i}": np.full(() if taken else 1, 1.5),
                     f"t{i}": np.full((channels, 1, 1) if taken else 1, 0.25)}  # fmt: skip
            nodes += [helper.make_node("Conv", [x, f"w{i}", f"b{i}"], [f"c{i}"], group=groups, pads=[side // 2] * 4),
                      helper.make_node("Mul", [f"s{i}", f"c{i}"][:: -1 if taken else 1], [f"m{i}"]),
                      helper.make_node("Add", [f"m{i}", f"t{i}"], [f"y{i}"])]  # fmt: skip
            x = f"y{i}"
        ends = [helper.make_tensor_value_info(v, 1, [1, channels, height, width]) for v in ("x", x)]
        weights = [numpy_helper.from_array(v.astype(np.float32), n) for n, v in held.items()]
        graph = helper.make_graph(nodes, "images", ends[:1], ends[1:], weights)
        opsets = [helper.make_opsetid("", 14)]
        sessions[name], times[name] = session(helper.make_model(graph, opset_imports=opsets, ir_version=8)), []
    feeds = {"x": rng.standard_normal((1, channels, height, width)).astype(np.float32)}
    for i in range(repeats + 3):
        for name in sorted(sessions, reverse=bool(i % 2)):
            started = time.perf_counter()
            sessions[name].run(None, feeds)
            times[name].append((time.perf_counter() - started) / CHAIN * 1e6)
    middle = {f"{name} us": round(statistics.median(found[3:]), 2) for name, found in times.items()}
    return {"cpu": environment()["cpu"], "image": [channels, height, width], **middle}


def main() -> None:
    """Measure the installed version, print, and add it to the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    version = ort.__version__
    opset = 23 if tuple(map(int, version.split(".")[:2])) >= (1, 23) else 18
    rows, cells = [], []
    for kind in ("rms_norm", "layer_norm") if "chains" in given.parts else ():
        for dtype in TYPES:
            for m, n in SHAPES:
                found = measure(kind, dtype, m, n, opset, given.repeats if m < 512 else given.repeats // 2)
                rows.append({"kind": kind, "type": dtype, "rows": m, "n": n, "forms": found})
                base = found["add, norm"]["us"]
                times = [f"{f['us']:.1f} ({f['us'] / base:.2f})" for f in found.values()]
                gap = [""] * (len(FORMS) - len(found))
                errors = (f"{f['error']:.0e}" for f in found.values())
                cells.append([kind, dtype, f"{m}x{n}", *times, *gap, *errors, *gap])
    print(f"ONNX Runtime {version}, us\n" + table(["kind", "type", "shape", *FORMS, *FORMS], cells, 3), flush=True)
    ops = [operator(op, m, given.repeats) for op in WIDE for m in (16, 4096)] if "operators" in given.parts else []
    cells = [[o["operator"], f"{o['rows']}x512", f"{o['us']:.1f}", f"{o['float32 us']:.1f}",
              f"{o['float32 us'] / o['us']:.2f}"] for o in ops]  # fmt: skip
    print(table(["operator", "shape", "float16", "float32", "ratio"], cells, 2), flush=True)
    written = [sums(m, n, given.repeats) for m, n in SHAPES] if "sums" in given.parts else []
    cells = [[f"{o['rows']}x{o['n']}", f"{o['Add us']:.1f}", f"{o['Sum us']:.1f}", f"{o['Sum us'] / o['Add us']:.2f}"]
             for o in written]  # fmt: skip
    print(table(["shape", "Add", "Sum", "ratio"], cells, 1), flush=True)
    scaled = [scales(n, given.repeats) for n in (1, 16, 128, 512)] if "scales" in given.parts else []
    cells = [[f"{o['tokens']}", f"{o['MatMul, Mul us']:.1f}", f"{o['FusedMatMul us']:.1f}",
              f"{o['FusedMatMul us'] / o['MatMul, Mul us']:.2f}"] for o in scaled]  # fmt: skip
    print(table(["tokens", "MatMul, Mul", "FusedMatMul", "ratio"], cells, 1), flush=True)
    images = [convolutions(*image, given.repeats) for image in IMAGES] if "convolutions" in given.parts else []
    cells = [["x".join(map(str, o["image"])), f"{o['one number us']:.1f}", f"{o['taken in us']:.1f}",
              f"{o['taken in us'] / o['one number us']:.2f}"] for o in images]  # fmt: skip
    print(table(["image", "one number", "taken in", "ratio"], cells, 1), flush=True)
    before = json.loads(given.out.read_text()) if given.out.exists() else {}
    known = {"versions": before.get("versions", {}) | ({version: rows} if rows else {}),
             "operators": before.get("operators", {}) | ({version: ops} if ops else {}),
             "sums": before.get("sums", {}) | ({version: written} if written else {}),
             "scales": before.get("scales", {}) | ({version: scaled} if scaled else {}),
             "convolutions": before.get("convolutions", {}) | ({version: images} if images else {})}  # fmt: skip
    machine = environment() if "chains" in given.parts else before["environment"]
    about = {"environment": machine | {"onnxruntime": "see versions"},
             "shapes": {"chain": CHAIN, "threads": 1, "eps": EPS}}  # fmt: skip
    result = about | {key: {v: found[v] for v in sorted(found, key=lambda v: tuple(map(int, v.split("."))))}
                      for key, found in known.items()}  # fmt: skip
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
