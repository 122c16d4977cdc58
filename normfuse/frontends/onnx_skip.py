"""ONNX Runtime's contrib operators for a residual addition and the norm behind it, where the table has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from normfuse.frontends.onnx import Lowering
from normfuse.frontends.onnx_emit import Emitter, plain
from normfuse.frontends.onnx_fused import FusedEmitter
from normfuse.frontends.onnx_infer import DTYPES
from normfuse.graph import Value
from normfuse.norm import Expr
from normfuse.plan import Fused, Reason
from normfuse.targets import Table

NAMES = {"rms_norm": "SkipSimplifiedLayerNormalization", "layer_norm": "SkipLayerNormalization"}
DOMAIN = "com.microsoft"


class SkipEmitter(FusedEmitter):
    """Makes s = x + residual; y = norm(s) of a model in one contrib operator.

    SkipLayerNormalization and SkipSimplifiedLayerNormalization of ONNX Runtime's contrib operators: rank 2 or 3, equal
    shapes, gamma of length N in the type of x, y rounded once, at the end.
    """

    def __init__(self, emitter: Emitter, table: Table) -> None:
        super().__init__(emitter, table.numerics == "exact")
        self.table = table

    def unfit(self, low: Lowering, edit: Fused) -> Reason | None:
        """Why an edit has no such operator, as (code, message), or None."""
        row = self.table.row(edit.sites[0].norm, edit.op)
        if row is None or row.form != "skip":
            return "NF202", "the target has no operator for it, or a slower one"
        norm = edit.sites[0].norm
        if edit.view is not None:
            return "NF202", "a view stands between the sum and the norm"
        if norm.kind == "rms_norm" and norm.bias is not None:
            return "NF202", "the operator has no bias"
        dtype, rows = norm.x.dtype or "", [expr for expr in (norm.weight, norm.bias) if expr]
        if norm.dtype != dtype or (dtype != "float32" and any(_narrow(expr, dtype) is None for expr in rows)):
            return "NF202", "the operator has one type for all"
        return super().unfit(low, edit)

    def emit(self, edit: Fused, operands: Mapping[Value, ir.Value], name: str) -> list[ir.Node]:
        """Nodes that make the weights, and last the operator."""
        nodes: list[ir.Node] = []
        norm = edit.sites[0].norm
        dtype = norm.x.dtype or ""
        inputs: list[ir.Value | None] = [operands[v] for v in edit.inputs]
        for expr, label in ((norm.weight, "weight"), (norm.bias, "bias")):
            if expr is not None:
                row = _narrow(expr, dtype)
                inputs.append(row or self.emitter.row(nodes, norm, expr, operands, dtype, f"{name}/{label}"))
            elif label == "weight":
                inputs.append(self.emitter.constant(np.ones([norm.size or 1]), dtype, "ones"))
        epsilon = ir.AttrFloat32("epsilon", norm.eps)
        node = ir.Node(DOMAIN, NAMES[norm.kind], inputs, [epsilon], num_outputs=4, name=name)
        for statistic in node.outputs[1:3]:
            statistic.name = ""
        nodes.append(node)
        return nodes

    def results(self, edit: Fused, nodes: Sequence[ir.Node]) -> Sequence[ir.Value]:
        """y and s among the outputs of the operator."""
        return nodes[-1].outputs[0], nodes[-1].outputs[3]

    def label(self, edit: Fused) -> str:
        """What stands there now, for the report."""
        return NAMES[edit.sites[0].norm.kind]


def _narrow(expr: Expr, dtype: str) -> ir.Value | None:
    """A row that is a parameter in a type, or a cast of one that only widens it; None for any other."""
    native: ir.Value | None = expr[0][1][0][0].native if plain(expr) else None
    node = None if native is None else native.producer()
    if native is not None and node is not None and node.op_type == "Cast":
        native = node.inputs[0]
    fits = native is not None and native.dtype == DTYPES[dtype] and native.shape is not None and len(native.shape) == 1
    return native if fits else None
