"""Checking one replaced region of an ONNX graph against its replacement, with ONNX's reference evaluator, each of its
results by itself.

The region's own nodes are run, not the neutral ones, so that a mistake of the front end shows too. In float64 every
float constant and cast is retyped. Equal regions (the layers of a model) are checked once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from normfuse.errors import first_line
from normfuse.frontends.onnx import Lowering
from normfuse.frontends.onnx_emit import DOMAIN, Emitter, unique
from normfuse.frontends.onnx_fused import FusedEmitter
from normfuse.frontends.onnx_region import VIEWS, Region, as_function, region, rest_of, results_of
from normfuse.graph import Dim, Value
from normfuse.norm import Norm
from normfuse.ort_values import Array
from normfuse.plan import Edit, Fused, Replace
from normfuse.sessions import numpy_dtype
from normfuse.verify import Check, compare

Model = tuple[onnx.ModelProto, onnx.ModelProto]
Shapes = list[tuple[int, ...]]
Runner = Callable[[Array, bool], list[Array]]
DOUBLE = ir.DataType.DOUBLE
MOST = 2**24
"""Elements that are written down or drawn at once: of a row, of an input."""
FLOAT_TYPES = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, DOUBLE}


class Checker:
    """Checks edits of one model; remembers what it has checked by the text of region and replacement."""

    def __init__(self, opset: int, numerics: str = "exact", inline: bool = False) -> None:
        self.opset, self.exact, self.inline = opset, numerics == "exact", inline
        self.done: dict[bytes, Check] = {}

    def check(self, low: Lowering, edit: Edit) -> Check:
        """Compare the region of an edit with what would take its place."""
        loose = region(low, edit)
        shapes = _test_shapes(edit, loose)
        if max(map(math.prod, shapes)) > MOST:
            return Check(False, message=f"more than {MOST} elements would be drawn to check it")
        found = region(low, edit, _sizes(edit, shapes))
        if found is None:
            return Check(False, message="the region depends on values that cannot be reproduced alone")
        boundary = found.boundary
        old = _proto(low, edit, found, self.opset)
        emitter = Emitter(self.opset, spelled=True, inline=self.inline)
        copies = {v: ir.Value(name=v.native.name) for v in boundary if v.native is not None}
        if isinstance(edit, Fused) and edit.view is not None:
            target = edit.view.native.producer().inputs[1]
            if target in found.constants:
                constant = ir.tensor(np.array(found.constants[target], np.int64))
                emitter.fresh.append(ir.Value(name="target", const_value=constant))
                copies[edit.view] = emitter.fresh[-1]
        made = self._made(low, edit, emitter, copies, _sizes(edit, shapes))
        if made is None:
            return Check(False, message="the region reads what only a whole run knows")
        used: set[str | None] = {v.native.name for v in boundary}
        for fresh in emitter.fresh:
            fresh.name = unique(fresh.name or "", used)
        given = FusedEmitter(emitter).results(edit, made) if isinstance(edit, Fused) else made[-1].outputs
        for value, new_value in zip(results_of(edit), given, strict=True):
            new_value.name = value.native.name
        new = _made_proto(made, boundary, emitter, edit, self.opset)
        key = old[0].SerializeToString(deterministic=True) + new[0].SerializeToString(deterministic=True)
        key += repr([(v.dtype, v.shape) for v in boundary]).encode()
        if key not in self.done:
            self.done[key] = self._compare(old, new, edit, boundary, shapes)
        result = self.done[key]
        if isinstance(edit, Replace):
            for statistic, formula in ((edit.mean, _mean), (edit.rstd, _rstd)):
                if statistic is not None and result.ok:
                    result = self._statistic(low, Replace(replace(edit.site, value=statistic)), formula, shapes)
        return result

    def _made(self, low: Lowering, edit: Edit, emitter: Emitter, copies: dict[Value, ir.Value],
              sizes: dict[Dim, int]) -> list[ir.Node] | None:  # fmt: skip
        if isinstance(edit, Fused):
            return FusedEmitter(emitter).emit(edit, copies, "replacement")
        if edit.as_written:
            own = as_function(low, edit.site, self.opset, sizes)
            return None if own is None else emitter.call(own[0], [copies[v] for v in own[1]], "replacement")
        made = emitter.emit(edit.site.norm, copies[edit.site.norm.x], copies, "replacement")
        emitter.tail(made, rest_of(edit.site.value), copies, "replacement")
        return made

    def _compare(self, old: Model, new: Model, edit: Edit, boundary: list[Value], shapes: Shapes) -> Check:
        run_old, run_new = _runner(old, boundary, shapes), _runner(new, boundary, shapes)
        worst = Check(True, same=True)

        def result(run: Runner, k: int) -> Callable[[Array, bool], Array]:
            return lambda x, wide: run(x, wide)[k]

        try:
            for k, out in enumerate(results_of(edit)):
                found = compare(result(run_old, k), result(run_new, k), shapes[0], boundary[0].dtype or "",
                                out.dtype or "", self.exact)  # fmt: skip
                if not found.ok:
                    return found
                worst = max(worst, found, key=lambda check: check.after)
        except Exception as why:  # the reference evaluator raises anything; not checked means not kept
            return Check(False, message=f"the check could not run: {first_line(why)[:200]}")
        return worst

    def _statistic(self, low: Lowering, edit: Replace, formula: Callable[[Array, Norm], Array],
                   shapes: Shapes) -> Check:  # fmt: skip
        """Compare a statistic that the operator is to give with its formula."""
        found, norm = region(low, edit, _sizes(edit, shapes)), edit.site.norm
        if found is None:
            return Check(False, message="a statistic depends on values that cannot be reproduced alone")
        old = _runner(_proto(low, edit, found, self.opset), found.boundary, shapes)
        return compare(lambda x, wide: old(x, wide)[0], lambda x, wide: formula(x, norm), shapes[0],
                       norm.x.dtype or "", norm.compute)  # fmt: skip


def _mean(x: Array, norm: Norm) -> Array:
    return np.asarray(x.mean(axis=norm.axes, keepdims=True))


def _rstd(x: Array, norm: Norm) -> Array:
    return np.asarray(1 / np.sqrt(x.var(axis=norm.axes, keepdims=True) + norm.eps))


FIXED = {*VIEWS, "Shape", "Size", "InstanceNormalization", "BatchNormalization"}
"""Operators whose results, or rows, are of a size that other operands have, too."""


def _test_shapes(edit: Edit, found: Region | None) -> Shapes:
    """The shapes of the inputs to test with: rows are cut down unless something in the region fixes them."""
    fixed = isinstance(edit, Replace) and bool(rest_of(edit.site.value))
    if found is not None:
        fixed = fixed or any(node.op_type in FIXED for node in found.nodes)
        fixed = fixed or any(_has_rows(np.shape(array), edit.sites[0].norm) for array in found.constants.values())
    shapes = []
    for k, value in enumerate(dict.fromkeys(edit.inputs)):
        axes, shape = edit.sites[min(k, len(edit.sites) - 1)].norm.axes, []
        for i, d in enumerate(value.shape or ()):
            if isinstance(d, int):
                shape.append(d if fixed or i in axes else min(d, 3))
            else:
                shape.append(8 if i in axes else 2)
        shapes.append(tuple(shape))
    return shapes


def _has_rows(shape: tuple[int, ...], norm: Norm) -> bool:
    """Whether a constant has more than one element along an axis that is not normalised."""
    first = len(norm.x.shape or ()) - len(shape)
    return any(d != 1 and first + i not in norm.axes for i, d in enumerate(shape))


def _sizes(edit: Edit, shapes: Shapes) -> dict[Dim, int]:
    """What each symbol stands for in a test."""
    pairs = zip(dict.fromkeys(edit.inputs), shapes, strict=True)
    return {d: n for v, shape in pairs for d, n in zip(v.shape or (), shape, strict=True)}


def _parameters(boundary: list[Value], inputs: int) -> dict[str, Array]:
    """Random parameters by name, drawn from the position so that equal regions get equal ones."""
    out = {}
    for i, v in enumerate(boundary[inputs:], inputs):
        rng = np.random.default_rng(i + 1)
        size = tuple(d if isinstance(d, int) else 1 for d in v.shape or ())
        out[f"v{i}"] = rng.standard_normal(size) * 0.5 + 1.25
    return out


def _proto(low: Lowering, edit: Edit, found: Region, opset: int) -> Model:
    names: dict[ir.Value, str] = {v.native: f"v{i}" for i, v in enumerate(found.boundary)}
    protos: list[onnx.NodeProto] = []
    for value, array in found.constants.items():
        names[value] = f"c{len(names)}"
        tensor = ir.to_proto(ir.tensor(np.array(array, order="C")))
        protos.append(onnx.helper.make_node("Constant", [], [names[value]], value=tensor))
    for node in found.nodes:
        for v in node.outputs:
            names.setdefault(v, f"t{len(names)}")
        proto = ir.to_proto(node)
        proto.name = proto.doc_string = ""
        del proto.metadata_props[:]
        del proto.input[:], proto.output[:]
        proto.input.extend("" if v is None else names[v] for v in node.inputs)
        proto.output.extend(names[v] for v in node.outputs)
        protos.append(proto)
    used = {n for p in protos for n in p.input}
    functions = [ir.to_proto(f) for f in low.source.meta.get("normfuse.functions", {}).values() if f.domain == DOMAIN]
    return _finish(protos, [n for v, n in names.items() if n in used and n[0] == "v"],
                   [names[v.native] for v in results_of(edit)], opset, functions)  # fmt: skip


def _made_proto(made: list[ir.Node], boundary: list[Value], emitter: Emitter, edit: Edit, opset: int) -> Model:
    renamed = {v.native.name: f"v{i}" for i, v in enumerate(boundary)}
    protos = []
    for value in emitter.fresh:
        assert value.const_value is not None
        protos.append(onnx.helper.make_node("Constant", [], [value.name or ""], value=ir.to_proto(value.const_value)))
    for i, node in enumerate(made):
        for v in node.outputs:
            renamed.setdefault(v.name or "", f"t{len(renamed)}") if v.name else None
            if v.name is None:
                v.name = f"inner{i}"
    for node in made:
        proto = ir.to_proto(node)
        proto.name = ""
        for field in (proto.input, proto.output):
            names = [renamed.get(n, n) for n in field]
            del field[:]
            field.extend(names)
        protos.append(proto)
    used = {n for p in protos for n in p.input}
    outputs = [renamed[v.native.name] for v in results_of(edit)]
    functions = [ir.to_proto(f) for f in emitter.functions.values()]
    return _finish(protos, [n for n in renamed.values() if n in used and n[0] == "v"], outputs, opset, functions)


def _finish(nodes: list[onnx.NodeProto], inputs: list[str], outputs: list[str], opset: int,
            functions: list[onnx.FunctionProto]) -> Model:  # fmt: skip
    """The model in its own types and the same in float64."""
    others = {DOMAIN, "com.microsoft", *(node.domain for node in nodes)} - {""}
    imports = [onnx.helper.make_opsetid("", opset), *(onnx.helper.make_opsetid(d, 1) for d in sorted(others))]
    graph = onnx.helper.make_graph(
        nodes, "g", [onnx.helper.make_tensor_value_info(n, 1, None) for n in sorted(set(inputs))],
        [onnx.helper.make_tensor_value_info(n, 1, None) for n in outputs],
    )  # fmt: skip
    own = onnx.helper.make_model(graph, opset_imports=imports, functions=functions)
    if functions:  # the evaluator would run a function's body without the operators given to it
        own = onnx.inliner.inline_local_functions(own)
    wide = onnx.ModelProto()
    wide.CopyFrom(own)
    nodes = [part for node in wide.graph.node for part in _widen(node)]
    del wide.graph.node[:]
    wide.graph.node.extend(nodes)
    return own, wide


def in_float64(nodes: list[onnx.NodeProto], inputs: list[str], outputs: list[str], opset: int) -> onnx.ModelProto:
    """Some nodes as a model that computes in float64."""
    return _finish(nodes, inputs, outputs, opset, [])[1]


def _widen(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """A node retyped to float64."""
    for attr in node.attribute:
        if attr.name == "to" and ir.DataType(attr.i) in FLOAT_TYPES:
            attr.i = DOUBLE.value
        elif attr.name == "value" and attr.t.data_type and ir.DataType(attr.t.data_type) in FLOAT_TYPES:
            attr.t.CopyFrom(onnx.numpy_helper.from_array(_array(attr.t).astype(np.float64), ""))
        elif attr.name == "value_float" and not attr.ref_attr_name:
            value = np.array(attr.f, np.float64)
            attr.Clear()
            attr.CopyFrom(onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(value, "")))
    if node.op_type == "Constant" and any(a.name == "value_float" for a in node.attribute):
        name = node.output[0]
        node.output[0] = f"{name}_single"
        return [node, onnx.helper.make_node("Cast", [f"{name}_single"], [name], to=DOUBLE.value)]
    return [node]


def _array(tensor: onnx.TensorProto) -> Array:
    return np.asarray(ir.serde.deserialize_tensor(tensor).numpy()).astype(np.float64)


class Expand(OpRun):
    """The operand keeps its size where the shape has -1, which `region` leaves for a size that is not known alone."""

    op_domain = ""

    def _run(self, data: Array, shape: Array) -> tuple[Array]:
        return (np.broadcast_to(data, np.broadcast_shapes(data.shape, tuple(np.abs(shape)))),)


class Gather(OpRun):
    """Elements by index; onnx before 1.23 fails where the indices are a transposed view."""

    op_domain = ""

    def _run(self, x: Array, indices: Array, axis: int = 0) -> tuple[Array]:
        return (np.take(x, indices, axis=axis),)


class ReduceMean(OpRun):
    """A mean rounded once, as runtimes compute it; the reference adds up in the type of the data."""

    op_domain = ""

    def _run(self, data: Array, axes: Any = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> tuple[Array]:
        over = None if axes is None else tuple(int(a) for a in np.asarray(axes).reshape(-1))
        if not over and noop_with_empty_axes:
            return (data,)
        wide = np.mean(data.astype(np.float64), axis=over or None, keepdims=bool(keepdims))
        return (wide.astype(data.dtype),)


class FusedMatMul(OpRun):
    """ONNX Runtime's alpha * a @ b, each transposed first where it says so."""

    op_domain = "com.microsoft"

    def _run(self, a: Array, b: Array, alpha: float = 1.0, transA: int = 0, transB: int = 0,  # noqa: N803
             transBatchA: int = 0, transBatchB: int = 0) -> tuple[Array]:  # fmt: skip # noqa: N803
        if transBatchA or transBatchB:
            raise NotImplementedError("FusedMatMul of transposed batches")
        a, b = (np.swapaxes(m, -1, -2) if turned and m.ndim > 1 else m for m, turned in ((a, transA), (b, transB)))
        return ((alpha * (a @ b)).astype(a.dtype),)


class LayerNormalization(OpRun):
    """The norm in float32, rounded to the type of X before the scale, as ONNX says; the reference stays in half."""

    op_domain = ""
    centred = True

    def _run(self, x: Array, scale: Array, bias: Array | None = None, axis: int = -1, epsilon: float = 1e-5,
             stash_type: int = 1) -> tuple[Array, ...]:  # fmt: skip
        return self._all(x, scale, bias, axis, epsilon, stash_type)[: len(self.onnx_node.output)]

    def _all(self, x: Array, scale: Array, bias: Array | None, axis: int, epsilon: float,
             stash_type: int) -> tuple[Array, ...]:  # fmt: skip
        compute = np.float64 if x.dtype == np.float64 else ir.DataType(stash_type).numpy()
        axes = tuple(range(axis % x.ndim, x.ndim))

        def mean(v: Array) -> Array:
            return np.asarray(np.mean(v.astype(np.float64), axis=axes, keepdims=True)).astype(compute)

        h = x.astype(compute)
        middle = mean(h)
        h = h - middle if self.centred else h
        rstd = 1 / np.sqrt(mean(h * h) + np.asarray(epsilon, compute))
        y = (h * rstd).astype(x.dtype) * scale
        return y if bias is None else y + bias, middle, rstd


class RMSNormalization(LayerNormalization):
    """The same without the mean."""

    centred = False


class SimplifiedLayerNormalization(RMSNormalization):
    """ONNX Runtime's own name for it, which it keeps in ONNX's domain; its second output is the deviation."""

    def _run(self, x: Array, scale: Array, axis: int = -1, epsilon: float = 1e-5,  # type: ignore[override]
             stash_type: int = 1) -> tuple[Array, ...]:  # fmt: skip
        y, _, rstd = self._all(x, scale, None, axis, epsilon, stash_type)
        return (y, rstd)[: len(self.onnx_node.output)]


OPS: list[Any] = [
    Expand, Gather, ReduceMean, FusedMatMul, LayerNormalization, RMSNormalization, SimplifiedLayerNormalization,
    type("SimplifiedLayerNormalization", (SimplifiedLayerNormalization,), {"op_domain": "com.microsoft"}),
]  # fmt: skip


def _runner(model: Model, boundary: list[Value], shapes: Shapes) -> Runner:
    """Runs a model on x, and on rows of x in other places for the other inputs."""
    params = _parameters(boundary, len(shapes))
    types = {f"v{i}": v.dtype or "float32" for i, v in enumerate(boundary)}
    evaluators: dict[bool, ReferenceEvaluator] = {}
    wanted = {i.name for i in model[0].graph.input}

    def run(x: Array, wide: bool) -> list[Array]:
        others = {f"v{i}": np.resize(np.roll(x, 7 * i), shape) for i, shape in enumerate(shapes) if i}
        if wide not in evaluators:
            evaluators[wide] = ReferenceEvaluator(model[1] if wide else model[0], new_ops=OPS)
        feeds = {}
        for name, array in {"v0": x, **others, **params}.items():
            if name in wanted:
                array = array.astype(numpy_dtype(types[name]))
                feeds[name] = array.astype(np.float64) if wide else array
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs: Any = evaluators[wide].run(None, feeds)
        return [np.asarray(out) for out in outputs]

    return run


