"""ONNX Runtime's contrib operators for a residual addition and the norm behind it, where the table has them.

Where it says that they are slow, those that a model has already are taken apart before anything else is done with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from normfuse.frontends.onnx import Lowering
from normfuse.frontends.onnx_emit import Emitter, names_of, respell
from normfuse.frontends.onnx_fold import attribute
from normfuse.frontends.onnx_functions import spelled
from normfuse.frontends.onnx_fused import FusedEmitter, narrowed
from normfuse.frontends.onnx_infer import DTYPES
from normfuse.frontends.onnx_contrib import SKIP_EPSILON
from normfuse.graph import Value
from normfuse.norm import Expr, Site, plain, region
from normfuse.passes.remove_dead import live
from normfuse.plan import Fused, Reason
from normfuse.targets import HALF, Row, Table

NAMES = {"rms_norm": "SkipSimplifiedLayerNormalization", "layer_norm": "SkipLayerNormalization"}
WITH_SUM = (*NAMES.values(), "EmbedLayerNormalization")
DOMAIN = "com.microsoft"


def with_sum(site: Site) -> bool:
    """Whether an operator of the model computes a norm together with the sum ahead of it."""
    return any(node.op in WITH_SUM for node in region(site.value, site.norm))


class SkipEmitter(FusedEmitter):
    """Makes s = x + residual; y = norm(s) of a model in one contrib operator.

    SkipLayerNormalization and SkipSimplifiedLayerNormalization of ONNX Runtime's contrib operators: rank 2 or 3, equal
    shapes, gamma of length N in the type of x, y rounded once, at the end, as is the sum, of three in one type too.
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
        if not edit.round_sum:
            return "NF202", "the operator normalises the sum as it is rounded"
        if edit.view is not None:
            return "NF202", "a view stands between the sum and the norm"
        if norm.kind == "rms_norm" and norm.bias is not None:
            return "NF202", "the operator has no bias"
        dtype, rows = norm.x.dtype or "", [expr for expr in (norm.weight, norm.bias) if expr]
        if edit.x_bias is not None and dtype != "float32" and self.exact:
            return "NF202", "the operator does not round x and its bias before it adds the residual"
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
        if edit.x_bias is not None:
            beta = [None] if norm.kind == "layer_norm" and norm.bias is None else []
            bias = operands[edit.x_bias]
            inputs += [*beta, narrowed(edit.x_bias, bias, dtype) or bias]
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


def take_apart(lowerings: Sequence[Lowering], table: Table, opset: int) -> Counter[Row]:
    """Write out a model's Skip operators where its target has a faster form: an addition, and a norm spelled out.

    Those of half types add and normalise in float32, and round the sum for its other readers and the result at the end,
    as ONNX Runtime's kernels for the CPU do (contrib_ops/cpu/skip_layer_norm.cc). What they are then is found and
    verified like any other norm. Left alone: those whose mean or deviation is read, or whose result is not, those of
    unknown rank or width, in which no norm would be found, and those whose weights do not fit. Gives the rows used,
    with how often.
    """
    kinds = {name: kind for kind, name in NAMES.items()}
    chosen: list[tuple[ir.Node, Row, str]] = []
    for low in lowerings:
        alive = live(low.graph)
        for node in low.source:
            if node.domain != DOMAIN or node.op_type not in kinds or len(node.inputs) < 3 or not all(node.inputs[:3]):
                continue
            x, *others = [low.value(v) for v in node.inputs if v is not None]
            row, width = table.apart(kinds[node.op_type], x.dtype), x.shape[-1] if x.shape else None
            known = isinstance(width, int) and len(x.shape or ()) > 1
            fits = all(v.dtype == x.dtype for v in others) and all(v.shape == (width,) for v in others[1:])
            read = low.value(node.outputs[0]).producer in alive
            if row is not None and read and known and fits and not any(
                    v.uses() or v.is_graph_output() for v in node.outputs[1:3]):  # fmt: skip
                chosen.append((node, row, x.dtype or ""))
    used = names_of(low.source for low in lowerings if chosen)
    for node, row, dtype in chosen:
        _spell(node, row.kind, dtype, opset, used)
    return Counter(row for _, row, _ in chosen)


def _spell(node: ir.Node, kind: str, dtype: str, opset: int, used: set[str | None]) -> None:
    nodes: list[ir.Node] = []

    def op(name: str, *inputs: ir.Value, attributes: Sequence[ir.Attr] = ()) -> ir.Value:
        nodes.append(ir.Node("", name, inputs, attributes))
        return nodes[-1].outputs[0]

    def cast(value: ir.Value, to: str) -> ir.Value:
        return op("Cast", value, attributes=[ir.AttrInt64("to", DTYPES[to].value)]) if dtype in HALF else value

    slots = {i: cast(v, "float32") for i, v in enumerate(node.inputs) if v is not None}
    beta, bias = (slots.get(i) for i in ((3, 4) if kind == "layer_norm" else (-1, 3)))
    total = op("Add", slots[0] if bias is None else op("Add", slots[0], bias), slots[1])
    eps, given = attribute(node, "epsilon", SKIP_EPSILON), [total, slots[2], *([] if beta is None else [beta])]
    nodes += spelled(kind, given, [-1], eps, opset)
    results = {node.outputs[0]: cast(nodes[-1].outputs[0], dtype)}
    if read := [v for v in node.outputs[3:] if v.uses() or v.is_graph_output()]:
        results[read[0]] = cast(total, dtype)
    respell(node, nodes, results, used)


def _narrow(expr: Expr, dtype: str) -> ir.Value | None:
    """A row that is a parameter in a type, or a cast of one that only widens it; None for any other."""
    native = narrowed(expr[0][1][0][0], expr[0][1][0][0].native, dtype) if plain(expr) else None
    return native if native is not None and native.shape is not None and len(native.shape) == 1 else None
