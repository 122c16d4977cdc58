"""Norm operators that the standard allows and no runtime takes: x in a half type, scale and result in a wider one.

    RMSNormalization(x, w) -> y      becomes      Cast(x) -> RMSNormalization(.., w) -> y

torch's exporter writes them at opset 23 for half-precision models that apply the weight in float32 (Gemma 3, OLMo 2,
GPT-OSS), though ONNX's own shape inference gives y the type of x, and ONNX Runtime does not load the model. Nothing is
rounded that was not before.
"""

from __future__ import annotations

import onnx_ir as ir

HALF = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
NAMES = {"RMSNormalization", "LayerNormalization"}


def repair(graph: ir.Graph) -> int:
    """Put a cast before each such operator; how many there were."""
    found = [node for node in graph.all_nodes() if node.domain == "" and node.op_type in NAMES and _mixed(node)]
    for node in found:
        x, scale, *rest = node.inputs
        assert x is not None and scale is not None and scale.dtype is not None and node.graph is not None
        cast = ir.Node("", "Cast", [x], [ir.AttrInt64("to", scale.dtype.value)], name=f"{node.name}/upcast")
        cast.outputs[0].name = f"{node.outputs[0].name}_upcast"
        new = ir.Node("", node.op_type, [cast.outputs[0], scale, *rest], list(node.attributes.values()),
                      num_outputs=len(node.outputs), name=node.name, metadata_props=node.metadata_props,
                      doc_string=node.doc_string)  # fmt: skip
        node.graph.insert_before(node, [cast, new])
        for old, value in zip(node.outputs, new.outputs, strict=True):
            value.name, value.shape, value.type, value.doc_string = old.name, old.shape, old.type, old.doc_string
            old.replace_all_uses_with(value, replace_graph_outputs=True)
        new.outputs[0].type = ir.TensorType(scale.dtype)
        node.graph.remove(node, safe=True)
    return len(found)


def _mixed(node: ir.Node) -> bool:
    x, scale = [*node.inputs, None][:2]
    return x is not None and scale is not None and x.dtype in HALF and scale.dtype is not None and (
        scale.dtype not in HALF and scale.dtype.is_floating_point())  # fmt: skip
