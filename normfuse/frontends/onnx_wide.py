"""The same model with its norms computed in float64: what a model and its rewrite are measured against.

A model may be far from what it means itself: a variance as mean(x^2) - mean(x)^2 in float32 loses most of its digits
where the mean is large (Flax computes it so). Its rewrite is then nearer to the meaning, and far from the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from normfuse.config import Config
from normfuse.frontends.onnx import Lowering
from normfuse.frontends.onnx_certify import MAX_ERROR_SIZE, Program, constants_of
from normfuse.frontends.onnx_check import FLOAT_TYPES
from normfuse.frontends.onnx_infer import DTYPES
from normfuse.frontends.onnx_model import OnnxModel, operators
from normfuse.frontends.onnx_region import region, target_of
from normfuse.frontends.onnx_skip import take_apart
from normfuse.io.data import graphs
from normfuse.io.files import read_onnx, to_proto
from normfuse.ort_values import Array
from normfuse.plan import Replace
from normfuse.sessions import Given, session
from normfuse.targets import Table
from normfuse.verify import EPSILON, ROUNDINGS, compare_outputs, either_way, run_both

HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
FEW = 2.0
"""How far from float64 a model may be that is measured against all of itself there, in roundings of float16 (seen: up
to 0.7)."""
SLOW = frozenset("""AveragePool ConvTranspose DeformConv GRU GridSample If LSTM Loop MaxPool NonMaxSuppression RNN
                 Resize RoiAlign Scan""".split())
"""What ONNX's reference operators compute element by element, in Python, and sub-graphs."""
FUSIONS = ("LayerNormFusion", "LayerNormFusionL1", "LayerNormFusionL2", "SimplifiedLayerNormFusion")
"""ONNX Runtime's optimisers that make an operator of two types of a norm in float64 whose weight is not."""


def compare_rewritten(source: str | Path, result: str | Path, *, roundings: float = ROUNDINGS, seed: int = 0,
                      inputs: Mapping[str, Array] | None = None,
                      sizes: Mapping[str, int] | None = None) -> dict[str, Any]:  # fmt: skip
    """What `compare_models` says of a model and its rewrite; where they differ, the norms in float64 decide, and of a
    model that computes in a half type and has outputs of float32 how far it is from itself, since ONNX Runtime's
    optimisers leave out roundings, and then how far it is from float64.

    By the first they count as equal where no output of the rewrite is further from the model with its norms in float64
    than twice as far as the model itself is, give or take the roundings; of what is no float, such as a label, nothing
    may differ from that. Each output then has both distances, relative to its largest element: "before", the model's,
    and "after", the rewrite's. By the second, where the model's norms are exact, no output of the rewrite may be
    further from the model's than twice as far as what the model gives without these optimisers: "unoptimised". By the
    third all of the model is in float64, as the first has its norms; "float64" is then "model".
    """
    def compare(given: Mapping[str, Array] | None) -> tuple[dict[str, Array], dict[str, Any]]:
        feeds, names, first, second, provider = run_both(source, result, seed, Given(given or {}, sizes or {}))
        found = compare_outputs(names, first, second, roundings, provider)
        if not found["equal"]:
            found = _by_norms(found, source, feeds, names, first, second)
        if not found["equal"] and _has_half(read_onnx(source)[0]):
            found = _by_itself(found, source, feeds, names, first)
            found = found if found["equal"] else _by_model(found, source, feeds, names, first, second)
        return feeds, found

    return either_way(compare, inputs)


def _by_itself(found: dict[str, Any], source: str | Path, feeds: dict[str, Array], names: list[str],
               first: list[Any]) -> dict[str, Any]:  # fmt: skip
    """The verdict by how far the model is from what it gives without ONNX Runtime's optimisers; not where it is its
    norms that are inexact, or where it is further from itself than roundings to a half type take it."""
    roundings, outputs = found["tolerance"], found["outputs"]
    try:
        plain = session(source, optimise=False).run(names, feeds)
    except Exception:  # such as an operator without a kernel, which the optimisers remove
        return found
    equal, own = True, compare_outputs(names, first, plain, roundings, found["provider"])["outputs"]
    for output, other in zip(outputs, own, strict=True):
        gap, far, unit = output["max_rel"], other["max_rel"], roundings * EPSILON.get(output.get("dtype", ""), 0.0)
        if gap is None or far is None or not far <= ROUNDINGS * EPSILON["float16"] or output.get("before", 0.0) > unit:
            return found
        equal = equal and gap <= (2 * far + unit if unit else 0.0)
    for output, other in zip(outputs, own, strict=True):
        output["unoptimised"] = other["max_rel"]
    return found | {"equal": equal}


def _has_half(model: ir.Model) -> bool:
    """Whether some of a model is computed in a half type: that is cast to, or a parameter has it."""
    types = {v.dtype for graph in graphs(model) for v in (*graph.inputs, *graph.initializers.values())}
    nodes = (node for graph in graphs(model) for node in graph)
    casts = [node.attributes["to"] for node in nodes if node.op_type == "Cast" and node.domain in ("", "ai.onnx")]
    return bool(HALVES & (types | {ir.DataType(to.as_int()) for to in casts if not to.is_ref()}))


def _by_norms(found: dict[str, Any], source: str | Path, feeds: dict[str, Array], names: list[str],
              first: list[Any], second: list[Any]) -> dict[str, Any]:  # fmt: skip
    """The verdict by the model with its norms in float64."""
    model, _ = read_onnx(source)
    if not widen_norms(model):
        return found
    try:  # weights beside the file stay there
        message = to_proto(model).SerializeToString()
        exact = session(message, Path(source).parent, FUSIONS).run(names, feeds)
    except Exception:  # such as a norm of which ONNX Runtime has no kernel in float64
        return found
    return _by_exact(found, exact, names, first, second, math.inf)


def _by_model(found: dict[str, Any], source: str | Path, feeds: dict[str, Array], names: list[str],
              first: list[Any], second: list[Any]) -> dict[str, Any]:  # fmt: skip
    """The verdict by all of the model in float64; not where it is further from that than a few roundings to float16, of
    which a stream with a large mean makes more than errors of its norms, or takes ONNX's reference operators long."""
    model = read_onnx(source)[0]
    if sum(v.size for v in constants_of(model).values()) > MAX_ERROR_SIZE or not SLOW.isdisjoint(operators(model)):
        return found
    try:
        model.graph.sort()  # a converter to float16 appends its casts
        wide = Program(model, True)
        outputs = wide.run(feeds, wide.own)
        exact = [outputs[name].astype(x.dtype) for name, x in zip(names, first, strict=True)]
    except Exception:  # the reference evaluator raises anything
        return found
    return _by_exact(found, exact, names, first, second, FEW * EPSILON["float16"]) | {"float64": "model"}


def _by_exact(found: dict[str, Any], exact: list[Any], names: list[str], first: list[Any], second: list[Any],
              most: float) -> dict[str, Any]:  # fmt: skip
    """The verdict by what is exact, from which the model's own outputs are at most so far."""
    roundings, provider = found["tolerance"], found["provider"]
    before, after = (compare_outputs(names, exact, own, roundings, provider) for own in (first, second))
    equal = True
    for output, old, new in zip(found["outputs"], before["outputs"], after["outputs"], strict=True):
        if old["max_rel"] is None or new["max_rel"] is None:
            return found
        output["before"], output["after"] = old["max_rel"], new["max_rel"]
        unit = EPSILON.get(output["dtype"], 0.0)
        allowed = 2 * old["max_rel"] + roundings * unit if unit else 0.0
        equal = equal and math.isfinite(old["max_rel"]) and old["max_rel"] <= most and new["max_rel"] <= allowed
    return found | {"equal": equal}


def widen_norms(model: ir.Model) -> int:
    """Compute the model's own nodes of each norm of the main graph in float64, in place; how many norms these are.

    What goes in is cast to float64 and what comes out is cast back, so that one rounding of the result is left. Skip
    operators, which ONNX Runtime has not in float64, are written out before.
    """
    one = OnnxModel(model, Config(), rewrite=False)
    if take_apart(one.lowerings, Table(Config(target="normfuse")), one.opset):
        one = OnnxModel(model, Config(), rewrite=False)
    low, nodes, count = one.lowerings[0], dict[ir.Node, None](), 0
    for site in one.plans[0].found.sites:
        x, result = site.norm.x.native, target_of(site).native
        if x is None or x.producer() is result.producer():
            continue  # a Skip operator that is not taken apart: the sum is made inside of it
        found = region(low, Replace(site))
        if found is not None:
            nodes.update(dict.fromkeys(found.nodes))
            count += 1
    _widen(low, nodes)
    return count


def _widen(low: Lowering, nodes: dict[ir.Node, None]) -> None:
    made = {v for node in nodes for v in node.outputs}
    types = {v: _type(low, v) for node in nodes for v in (*node.inputs, *node.outputs) if v is not None}
    wide: dict[ir.Value, ir.Value] = {}
    graph = low.source
    for node in [n for n in graph if n in nodes]:
        for i, value in enumerate(node.inputs):
            if value is None or value in made or types[value] not in FLOAT_TYPES:
                continue
            if value not in wide:
                wide[value] = _cast(graph, value, ir.DataType.DOUBLE, before=node)
            node.replace_input_with(i, wide[value])
        to = node.attributes.get("to")
        if to is not None and ir.DataType(to.as_int()) in FLOAT_TYPES:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.DOUBLE)
    for node in [n for n in graph if n in nodes]:
        for value in node.outputs:
            dtype = types[value]
            readers = [(user, i) for user, i in value.uses() if user not in nodes]
            if dtype not in FLOAT_TYPES:
                continue
            value.dtype = ir.DataType.DOUBLE  # what a file states of a value inside a norm has to be true
            if not readers and not value.is_graph_output():
                continue
            narrow = _cast(graph, value, dtype, after=node)
            for user, i in readers:
                if user is not narrow.producer():
                    user.replace_input_with(i, narrow)
            if value.is_graph_output():
                narrow.name, value.name = value.name, f"{value.name}_float64"
                narrow.shape, narrow.dtype = value.shape, dtype
                graph.outputs[:] = [narrow if v is value else v for v in graph.outputs]


def _type(low: Lowering, value: ir.Value) -> ir.DataType | None:
    known = low.values.get(value)
    return DTYPES.get(known.dtype or "") if known is not None else value.dtype


def _cast(graph: ir.Graph, value: ir.Value, to: ir.DataType, before: ir.Node | None = None,
          after: ir.Node | None = None) -> ir.Value:  # fmt: skip
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", to)], name=f"{value.name}_to_{to.name.lower()}")
    node.outputs[0].name = node.name
    if after is not None:
        graph.insert_after(after, node)
    else:
        assert before is not None
        graph.insert_before(before, node)
    return node.outputs[0]
