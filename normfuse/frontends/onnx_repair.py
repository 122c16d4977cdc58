"""Norm operators that the standard allows and no runtime takes: x and the scale of different types, y of the scale's.

    RMSNormalization(x, w) -> y      becomes      Cast(x) -> RMSNormalization(.., w) -> y           of half x, wider w
                                     becomes      x / sqrt(mean(x^2) + eps) -> Cast -> Mul(w) -> y  of half w, wider x

torch's exporter writes them at opset 23 for half-precision models that apply the weight in float32 (Gemma 3, OLMo 2,
GPT-OSS), or that normalise a sum in float32 (vLLM): onnxscript's rule takes the cast before a product with the scale
into the operator (rewriter/rules/fusion/_rms_normalization.py). ONNX Runtime does not load the model. Nothing is
rounded that was not before.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from normfuse.frontends.onnx import Lowering
from normfuse.frontends.onnx_emit import names_of, unique
from normfuse.frontends.onnx_fold import attribute
from normfuse.frontends.onnx_functions import spelled
from normfuse.frontends.onnx_infer import DTYPES

HALF = ("float16", "bfloat16")
KINDS = {"RMSNormalization": "rms_norm", "LayerNormalization": "layer_norm"}


def in_order(model: ir.Model) -> bool:
    """Whether every node of every graph stands behind those whose results it reads."""
    for graph in model.graphs():
        seen: set[ir.Node] = set()
        for node in graph:
            for value in node.inputs:
                source = value.producer() if value is not None else None
                if source is not None and source.graph is graph and source not in seen:
                    return False
            seen.add(node)
    return True


def repair(lowerings: Sequence[Lowering], opset: int) -> int:
    """Put a cast where each such operator lacks one; how many there were."""
    found = [(low, node) for low in lowerings for node in low.source
             if node.domain == "" and node.op_type in KINDS and _mixed(low, node)]  # fmt: skip
    used = names_of(low.source for low in lowerings) if found else set()
    for low, node in found:
        x, scale, *rest = node.inputs
        assert x is not None and scale is not None and node.graph is not None
        scale_type, name = DTYPES[low.value(scale).dtype or ""], node.outputs[0].name
        to = ir.AttrInt64("to", scale_type.value)
        if low.value(x).dtype in HALF:
            cast = ir.Node("", "Cast", [x], [to], name=f"{node.name}/upcast")
            nodes = [cast, ir.Node("", node.op_type, [cast.outputs[0], scale, *rest], list(node.attributes.values()),
                                   num_outputs=len(node.outputs))]  # fmt: skip
        else:
            eps = float(attribute(node, "epsilon", 1e-5))
            nodes = spelled(KINDS[node.op_type], [x], _axes(x, node), eps, opset)
            nodes.append(ir.Node("", "Cast", [nodes[-1].outputs[0]], [to]))
            for op, value in (("Mul", scale), ("Add", rest[0] if rest else None)):
                if value is not None:
                    nodes.append(ir.Node("", op, [nodes[-1].outputs[0], value]))
        for i, new in enumerate(nodes):
            new.outputs[0].name, new.name = unique(f"{name}_normfuse{i}", used), new.name or f"{node.name}/{i}"
            new.metadata_props.update(node.metadata_props)
        nodes[-1].name, nodes[-1].doc_string = node.name, node.doc_string
        node.graph.insert_before(node, nodes)
        for old, value in zip(node.outputs, nodes[-1].outputs, strict=False):
            value.name, value.shape, value.type, value.doc_string = old.name, old.shape, old.type, old.doc_string
            old.replace_all_uses_with(value, replace_graph_outputs=True)
        nodes[-1].outputs[0].type = ir.TensorType(scale_type)
        node.graph.remove(node, safe=True)
    return len(found)


def _mixed(low: Lowering, node: ir.Node) -> bool:
    x, scale = [*node.inputs, None][:2]
    if x is None or scale is None:
        return False
    types = low.value(x).dtype, low.value(scale).dtype
    if types[0] in HALF:
        return types[1] in ("float32", "float64")
    alone = not any(v.uses() or v.is_graph_output() for v in node.outputs[1:])
    return types[0] == "float32" and types[1] in HALF and alone and bool(_axes(x, node))


def _axes(x: ir.Value, node: ir.Node) -> list[int]:
    """The normalised axes, from the end; none where the rank decides and is not known."""
    axis = int(attribute(node, "axis", -1))
    if axis >= 0 and x.shape is None:
        return []
    return list(range(axis if axis < 0 else axis - len(x.shape or ()), 0))
