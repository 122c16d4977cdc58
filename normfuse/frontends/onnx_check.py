"""Checking one replaced region of an ONNX graph against its replacement, with ONNX's reference evaluator.

The region's own nodes are run, not the neutral ones, so that a mistake of the front end shows too. In float64 every
float constant and cast is retyped. Equal regions (the layers of a model) are checked once.
"""

from __future__ import annotations

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

from normfuse.frontends.onnx import Lowering
from normfuse.frontends.onnx_emit import DOMAIN, Emitter
from normfuse.frontends.onnx_region import VIEWS, Region, as_function, region, rest_of, target_of
from normfuse.graph import Value
from normfuse.plan import Replace
from normfuse.norm import Norm, Site
from normfuse.verify import Array, Check, compare, numpy_dtype

DOUBLE = ir.DataType.DOUBLE
FLOAT_TYPES = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, DOUBLE}


class Checker:
    """Checks sites of one model; remembers what it has checked by the text of region and replacement."""

    def __init__(self, opset: int, numerics: str = "exact") -> None:
        self.opset, self.exact = opset, numerics == "exact"
        self.done: dict[bytes, Check] = {}

    def check(self, low: Lowering, edit: Replace) -> Check:
        """Compare the region of a site with what would take its place."""
        site = edit.site
        loose = region(low, site)
        shape = _test_shape(site, [] if loose is None else loose.nodes)
        found = region(low, site, shape)
        if found is None:
            return Check(False, message="the region depends on values that cannot be reproduced alone")
        boundary = found.boundary
        old = _proto(low, site, found, self.opset)
        emitter = Emitter(self.opset, spelled=True)
        copies = {v: ir.Value(name=v.native.name) for v in boundary if v.native is not None}
        if edit.as_written:
            own = as_function(low, site, self.opset)
            if own is None:
                return Check(False, message="the region reads what only a whole run knows")
            made = emitter.call(own[0], [copies[v] for v in own[1]], "replacement")
        else:
            made = emitter.emit(site.norm, copies[site.norm.x], copies, "replacement")
            emitter.tail(made, rest_of(site.value), copies, "replacement")
        made[-1].outputs[0].name = target_of(site).native.name
        new = _made_proto(made, boundary, emitter, site, self.opset)
        key = old[0].SerializeToString(deterministic=True) + new[0].SerializeToString(deterministic=True)
        key += repr([(v.dtype, v.shape) for v in boundary]).encode()
        if key not in self.done:
            params = _parameters(boundary, site.norm.x)
            try:
                self.done[key] = compare(_runner(old, boundary, params), _runner(new, boundary, params), shape,
                                         site.norm.x.dtype or "", target_of(site).dtype or "", self.exact)  # fmt: skip
            except Exception as why:  # the reference evaluator raises anything; not checked means not kept
                text = (str(why) or type(why).__name__).splitlines()[0]
                self.done[key] = Check(False, message=f"the check could not run: {text[:200]}")
        result = self.done[key]
        for value, formula in ((edit.mean, _mean), (edit.rstd, _rstd)):
            if value is not None and result.ok:
                result = self._statistic(low, replace(site, value=value), formula, shape)
        return result

    def _statistic(self, low: Lowering, site: Site, formula: Callable[[Array, Norm], Array],
                   shape: tuple[int, ...]) -> Check:  # fmt: skip
        """Compare a statistic that the operator is to give with its formula."""
        found = region(low, site, shape)
        if found is None:
            return Check(False, message="a statistic depends on values that cannot be reproduced alone")
        old = _runner(_proto(low, site, found, self.opset), found.boundary, _parameters(found.boundary, site.norm.x))
        return compare(old, lambda x, wide: formula(x, site.norm), shape, site.norm.x.dtype or "", site.norm.compute)


def _mean(x: Array, norm: Norm) -> Array:
    return np.asarray(x.mean(axis=norm.axes, keepdims=True))


def _rstd(x: Array, norm: Norm) -> Array:
    return np.asarray(1 / np.sqrt(x.var(axis=norm.axes, keepdims=True) + norm.eps))


def _test_shape(site: Site, nodes: list[ir.Node]) -> tuple[int, ...]:
    """The shape to test with: rows are cut down unless a view in the region fixes them."""
    fixed = bool(rest_of(site.value)) or any(node.op_type in {*VIEWS, "Shape", "Size"} for node in nodes)
    assert site.norm.x.shape is not None
    shape = []
    for i, d in enumerate(site.norm.x.shape):
        if isinstance(d, int):
            shape.append(d if fixed or i in site.norm.axes else min(d, 3))
        else:
            shape.append(8 if i in site.norm.axes else 2)
    return tuple(shape)


def _parameters(boundary: list[Value], x: Value) -> dict[str, Array]:
    """Random parameters by name, drawn from the position so that equal regions get equal ones."""
    out = {}
    for i, v in enumerate(boundary):
        if v is not x:
            rng = np.random.default_rng(i + 1)
            size = tuple(d if isinstance(d, int) else 1 for d in v.shape or ())
            out[f"v{i}"] = rng.standard_normal(size) * 0.5 + 1.25
    return out


Model = tuple[onnx.ModelProto, onnx.ModelProto]


def _proto(low: Lowering, site: Site, found: Region, opset: int) -> Model:
    names: dict[ir.Value, str] = {v.native: f"v{i}" for i, v in enumerate(found.boundary)}
    protos: list[onnx.NodeProto] = []
    for value, array in found.constants.items():
        names[value] = f"c{len(names)}"
        tensor = ir.to_proto(ir.tensor(np.ascontiguousarray(array)))
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
                   names[target_of(site).native], opset, functions)  # fmt: skip


def _made_proto(made: list[ir.Node], boundary: list[Value], emitter: Emitter, site: Site, opset: int) -> Model:
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
    output = renamed[target_of(site).native.name]
    functions = [ir.to_proto(f) for f in emitter.functions.values()]
    return _finish(protos, [n for n in renamed.values() if n in used and n[0] == "v"], output, opset, functions)


def _finish(nodes: list[onnx.NodeProto], inputs: list[str], output: str, opset: int,
            functions: list[onnx.FunctionProto]) -> Model:  # fmt: skip
    """The model in its own types and the same in float64."""
    imports = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(DOMAIN, 1),
               onnx.helper.make_opsetid("com.microsoft", 1)]  # fmt: skip
    graph = onnx.helper.make_graph(
        nodes, "g", [onnx.helper.make_tensor_value_info(n, 1, None) for n in sorted(set(inputs))],
        [onnx.helper.make_tensor_value_info(output, 1, None)],
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


class ReduceMean(OpRun):
    """A mean rounded once, as runtimes compute it; the reference adds up in the type of the data."""

    op_domain = ""

    def _run(self, data: Array, axes: Any = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> tuple[Array]:
        over = None if axes is None else tuple(int(a) for a in np.asarray(axes).reshape(-1))
        if not over and noop_with_empty_axes:
            return (data,)
        wide = np.mean(data.astype(np.float64), axis=over or None, keepdims=bool(keepdims))
        return (wide.astype(data.dtype),)


def _runner(model: Model, boundary: list[Value], params: dict[str, Array]) -> Callable[[Array, bool], Array]:
    types = {f"v{i}": v.dtype or "float32" for i, v in enumerate(boundary)}
    evaluators: dict[bool, ReferenceEvaluator] = {}
    wanted = {i.name for i in model[0].graph.input}

    def run(x: Array, wide: bool) -> Array:
        if wide not in evaluators:
            evaluators[wide] = ReferenceEvaluator(model[1] if wide else model[0], new_ops=[ReduceMean])
        feeds = {}
        for name, array in {"v0": x, **params}.items():
            if name in wanted:
                array = array.astype(numpy_dtype(types[name]))
                feeds[name] = array.astype(np.float64) if wide else array
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs: Any = evaluators[wide].run(None, feeds)
        return np.asarray(outputs[0])

    return run


