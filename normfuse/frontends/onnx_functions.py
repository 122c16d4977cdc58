"""The model-local functions: the two norms in plain ONNX, for opsets and axes that have no operator.

    layer_norm: y = cast(d / sqrt(mean(d**2) + eps)) * scale + bias,   d = x - mean(x)
    rms_norm:   y = cast(x / sqrt(mean(x**2) + eps)) * scale

computed in `stash` and cast back to the type of x before the scale, like LayerNormalization-17 and
RMSNormalization-23 of the ONNX specification. Attributes: `epsilon`, `axes` (from the end). The body of the float32
form is the one that runtimes know how to fuse themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from normfuse import facts
from normfuse.frontends.onnx_infer import DTYPES

Constant = Callable[["np.ndarray[Any, Any]", str, str], ir.Value]
"""Gives the value of an array in a type, under a name."""
SHORT = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64"}


def function_name(kind: str, weighted: bool, biased: bool, inner: str, stash: str, opset: int, eps: float,
                  unseen: bool = False) -> str:  # fmt: skip
    """The name of a function: the kind, then what departs from a float32 norm with all its parameters."""
    parts = [kind, *(["unseen"] if unseen else [])]
    if not weighted or (kind == "layer_norm" and not biased):
        parts.append("scale" if weighted else "bias" if biased else "plain")
    if inner != "float32" or stash != "float32":
        parts += [SHORT[inner]] if inner == stash else [SHORT[inner], "in", SHORT[stash]]
    if opset < 12:
        parts.append("eps" + facts.number(eps).replace("-", "m").replace(".", "p"))
    return "_".join(parts)


def function_for(kind: str, weighted: bool, biased: bool, inner: str, stash: str, opset: int,
                 eps: float, unseen: bool = False) -> ir.Function:  # fmt: skip
    """The function of a norm; below opset 12, where a Constant takes no attribute of the call, eps is in the body.

    `unseen`: ONNX Runtime is not to make one operator of it.
    """
    x = ir.Value(name="x")
    scale, bias = (ir.Value(name=n) if on else None for n, on in (("scale", weighted), ("bias", biased)))
    nodes = operators_for(kind, x, scale, bias, inner, stash, opset, eps, unseen)
    result = nodes[-1].outputs[0]
    result.name = "y"
    inputs = [v for v in (x, scale, bias) if v is not None]
    graph = ir.Graph(inputs, [result], nodes=nodes, opset_imports={"": opset}, name="")
    kinds = {"axes": ir.AttributeType.INTS, "epsilon": ir.AttributeType.FLOAT}
    attributes: list[Any] = [ir.Attr(attr, kind, None) for attr, kind in kinds.items()]
    name = function_name(kind, weighted, biased, inner, stash, opset, eps, unseen)
    function = ir.Function("normfuse", name, graph=graph, attributes=attributes)
    function.doc_string = _FORMULA[kind]
    return function


def operators_for(kind: str, x: ir.Value, scale: ir.Value | None, bias: ir.Value | None, inner: str, stash: str,
                  opset: int, eps: float, unseen: bool = False, axes: Sequence[int] | None = None,
                  constant: Constant | None = None) -> list[ir.Node]:  # fmt: skip
    """The nodes of a norm of x, the last of which gives it; without `axes`, these and eps are attributes of a call.

    `constant` gives the value of an array in a type, under a name; without it there are nodes for them.
    """
    nodes: list[ir.Node] = []

    def op(name: str, args: list[ir.Value], out: str, *attrs: ir.Attr) -> ir.Value:
        nodes.append(ir.Node("", name, args, attrs, name=f"n{len(nodes)}"))
        nodes[-1].outputs[0].name = out if axes is None else None  # in a graph they could be those of others
        return nodes[-1].outputs[0]

    def number(c: float | Sequence[int], dtype: str, out: str) -> ir.Value:
        if constant is not None:
            return constant(np.array(c), dtype, out)
        array = np.array(c).astype(DTYPES[dtype].numpy())
        return op("Constant", [], out, ir.AttrTensor("value", ir.Tensor(array, dtype=DTYPES[dtype], name=out)))

    def mean(v: ir.Value, out: str) -> ir.Value:
        if opset < 18:
            given = ir.RefAttr("axes", "axes", ir.AttributeType.INTS) if axes is None else ir.AttrInt64s("axes", axes)
            return op("ReduceMean", [v], out, given)
        if axes is not None:
            return op("ReduceMean", [v, number(axes, "int64", "axes")], out)
        given = ir.RefAttr("value_ints", "axes", ir.AttributeType.INTS)
        return op("ReduceMean", [v, op("Constant", [], f"{out}_axes", given)], out)

    def cast(v: ir.Value, dtype: str, out: str) -> ir.Value:
        return op("Cast", [v], out, ir.AttrInt64("to", DTYPES[dtype].value))

    value = x if inner == stash else cast(x, stash, "x_cast")
    if kind == "layer_norm":
        value = op("Sub", [value, mean(value, "mean")], "centred")
    # ONNX Runtime 1.31 takes Pow for the start of its own fusion, any Mul behind the body for the scale, even one that
    # is wider than x, and 1e-5 for an eps that is not a float32: in these cases it must not see the pattern. Nor behind
    # a Cast from float64, which it takes into a LayerNormalization of mixed types that it has no kernel for.
    if scale is not None and stash == "float32" and not unseen:
        squared = op("Pow", [value, number(2.0, stash, "two")], "squared")
    else:
        squared = op("Mul", [value, value], "squared")
    statistic = mean(squared, "variance" if kind == "layer_norm" else "mean_square")
    if opset < 12 or axes is not None:
        small = number(eps, stash, "eps")
    else:
        small = op("Constant", [], "eps", ir.RefAttr("value_float", "epsilon", ir.AttributeType.FLOAT))
        small = small if stash == "float32" else cast(small, stash, "eps_cast")
    root = op("Sqrt", [op("Add", [statistic, small], "with_eps")], "root")
    value = op("Div", [value, root], "normalized")
    if inner != stash:
        value = cast(value, inner, "rounded")
    if scale is not None:
        value = op("Mul", [value, scale], "scaled")
    if bias is not None:
        value = op("Add", [value, bias], "shifted")
    return nodes


Body = tuple[list[ir.Value], list[ir.Node], list[ir.Value]]


def function_body(function: ir.Function, call: ir.Node) -> Body | None:
    """A copy of a function's inputs, nodes and outputs with the attributes of a call; None with sub-graphs in it."""
    values = {v: ir.Value(name=v.name) for v in function.inputs}
    nodes = []
    for node in function:
        attributes = []
        for attr in node.attributes.values():
            if attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
                return None
            if attr.is_ref():
                name = attr.ref_attr_name or ""
                given = call.attributes.get(name) or function.attributes.get(name)
                if given is None or (given.value is None and not given.is_ref()):
                    continue
                attr = ir.Attr(attr.name, given.type, given.value, given.ref_attr_name)
            attributes.append(attr)
        inputs = [None if v is None else values[v] for v in node.inputs]
        copy = ir.Node(node.domain, node.op_type, inputs, attributes, num_outputs=len(node.outputs), name=node.name)
        values.update(zip(node.outputs, copy.outputs, strict=True))
        nodes.append(copy)
    return [values[v] for v in function.inputs], nodes, [values[v] for v in function.outputs]


def spelled(kind: str, values: list[ir.Value], axes: list[int], eps: float, opset: int) -> list[ir.Node]:
    """The nodes of a float32 norm of the first value, with those behind it as scale and bias; the last one gives it."""
    x, scale, bias = [*values, None, None][:3]
    assert x is not None
    return operators_for(kind, x, scale, bias, "float32", "float32", opset, eps, axes=axes)


_FORMULA = {
    "layer_norm": "scale * (x - mean(x)) / sqrt(var(x) + epsilon) + bias, over axes",
    "rms_norm": "scale * x / sqrt(mean(x^2) + epsilon), over axes",
}
