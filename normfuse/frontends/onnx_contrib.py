"""Rows of the operator table for ONNX Runtime's own operators, domain com.microsoft.

Their meanings: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from normfuse.frontends.onnx_fold import attribute
from normfuse.frontends.onnx_infer import LIKE
from normfuse.frontends.onnx_ops import (
    Row,
    gemm_shape,
    matmul_shape,
    multiply,
    norm,
    norm_stages,
    quantize,
    role,
    same_type,
    shaped,
)
from normfuse.frontends.onnx_views import product_shape
from normfuse.graph import Shape, Value

if TYPE_CHECKING:
    from normfuse.frontends.onnx import Lowering

SKIP_EPSILON = 1e-12
"""What the contrib Skip operators add where the model does not say."""


def skip_norm(kind: str) -> Row:
    """The contrib Skip operators: add, then norm; the fourth output is the sum."""

    def row(low: Lowering, node: ir.Node) -> None:
        slots = dict(enumerate(node.inputs))
        x, skip = low.value(node.inputs[0]), low.value(node.inputs[1])
        if x.shape is None:
            low.note("NF115", node, f"the shape of {x.name} is not known")
            return low.opaque(node)
        before = slots.get(3 if kind == "rms_norm" else 4)
        if before is not None:
            x = low.chain("add", [x, low.value(before)], node, virtual=True)
        named = node.outputs[3] if len(node.outputs) > 3 else None
        total = low.virtual(x.shape, x.dtype) if named is None else low.bind(named, x.shape, x.dtype)
        low.emit("add", [x, skip], total, node)
        scale, bias = (slots.get(2), slots.get(3) if kind == "layer_norm" else None)
        out = low.output(node, x.shape, x.dtype)
        eps = float(attribute(node, "epsilon", SKIP_EPSILON))
        assert x.shape is not None
        norm_stages(low, node, kind, total, None if scale is None else low.value(scale),
                    None if bias is None else low.value(bias), (len(x.shape) - 1,), eps,
                    "float64" if x.dtype == "float64" else "float32", out)  # fmt: skip

    return row


def _fused_matmul(low: Lowering, node: ir.Node) -> None:
    """ONNX Runtime's ``alpha * A' @ B'``, of which either may be transposed in its last two axes."""
    operands = low.inputs(node)
    role = "linear" if any(v.fixed for v in operands) else "attention"  # not "matmul", of which the algebra knows all
    if attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
        return low.opaque(node, role)
    for i, turned in enumerate(attribute(node, name, 0) for name in ("transA", "transB")):
        v = operands[i]
        if turned and v.shape is None:
            return low.opaque(node, role)
        if turned and v.shape is not None and len(v.shape) > 1:
            *rest, m, n = range(len(v.shape))
            operands[i] = low.virtual((*v.shape[:-2], v.shape[-1], v.shape[-2]), v.dtype)
            low.emit("transpose", [v], operands[i], node, perm=(*rest, n, m))
    a, b = operands
    shape, alpha = matmul_shape(a, b), float(attribute(node, "alpha", 1.0))
    out = low.output(node, shape, a.dtype)
    if alpha == 1:
        return multiply(low, node, a, b, out)
    if role == "attention" and (out.shape is None or out.shape[-1] != 1):  # no dot of rows, so nothing of a norm
        return low.join(role, [a, b], [out], node)
    product = low.virtual(out.shape, out.dtype)
    multiply(low, node, a, b, product)
    low.emit("mul", [product, low.number(alpha, a.dtype)], out, node)


def _attention_shape(node: ir.Node, slots: list[Value | None]) -> Shape | None:
    """Of com.microsoft::Attention, whose weight holds query, key and value beside each other."""
    x, weight = slots[:2]
    if x is None or x.shape is None or len(x.shape) != 3:
        return None
    sizes = attribute(node, "qkv_hidden_sizes", None)
    width = weight.shape[-1] if weight is not None and weight.shape else None
    if sizes:
        return (*x.shape[:2], sizes[2]) if len(sizes) == 3 else None
    return (*x.shape[:2], width // 3 if isinstance(width, int) else None)


def _heads_shape(node: ir.Node, slots: list[Value | None]) -> Shape | None:
    """Of attention on a query of rank 3: as long as that, as wide as the value, or the query where all share heads."""
    query, key, value = (*slots, None, None)[:3]
    if query is None or query.shape is None or len(query.shape) != 3:
        return None
    if node.op_type != "MultiHeadAttention":  # of grouped queries, the heads of value are fewer
        if key is not None:
            return query.shape
        size = head_size(node, query.shape, None)
        return (*query.shape[:2], None if size is None else size * attribute(node, "num_heads"))
    if key is None or value is None or value.rank not in (3, 4) or value.shape is None:
        return None
    width = value.shape[-1]
    if value.rank == 4:  # of heads by tokens
        width = width * value.shape[1] if isinstance(width, int) and isinstance(value.shape[1], int) else None
    return (*query.shape[:2], width)


def _unpacked(slots: list[Value | None]) -> list[Value | None]:
    """Query, key, value and the rest, where the query holds all three and the next operand would seem to be the key."""
    query, key, value = (*slots, None, None, None)[:3]
    return slots if key is not None or value is not None else [query, query, query, *slots[3:]]


def head_size(node: ir.Node, query: Shape | None, key: Shape | None) -> int | None:
    """How wide a head of the key is; without a key, the query holds query, key and value one behind the other."""
    heads, shared = attribute(node, "num_heads", 0), attribute(node, "kv_num_heads")
    shared = heads if shared is None else shared
    shape, count = (query, heads + 2 * shared) if key is None else (key, shared)
    width = shape[-1] if shape and len(shape) == 3 else None
    return width // count if isinstance(width, int) and count > 0 and width % count == 0 else None


def _bits_shape(node: ir.Node, slots: list[Value | None]) -> Shape | None:
    """Of MatMulNBits: x of (..., K) gives (..., N)."""
    x = slots[0]
    return (*x.shape[:-1], attribute(node, "N")) if x is not None and x.shape else None


def _product_shape(node: ir.Node, slots: list[Value | None]) -> Shape | None:
    a, b = slots[:2]
    return None if a is None or b is None else matmul_shape(a, b)


def _embedded_shape(node: ir.Node, slots: list[Value | None]) -> Shape | None:
    """Of EmbedLayerNormalization: the ids, and the width of the table."""
    ids, table = slots[0], slots[2]
    if ids is None or table is None or ids.shape is None or not table.shape:
        return None
    return (*ids.shape, table.shape[-1])


def _embedding(low: Lowering, node: ir.Node) -> None:
    """ONNX Runtime's LayerNorm of the sum of up to three embeddings: of tokens, positions and segments."""
    slots = [None if v is None else low.value(v) for v in node.inputs]
    shape, table = _embedded_shape(node, slots), slots[2]
    gamma, beta = (*slots[5:7], None, None)[:2]
    if shape is None or table is None or table.dtype is None or gamma is None or beta is None:
        return shaped("gather", _embedded_shape, 2)(low, node)
    named = node.outputs[2] if len(node.outputs) > 2 else None
    total = low.virtual(shape, table.dtype) if named is None else low.bind(named, shape, table.dtype)
    masks = [low.bind(v, None, None) for v in node.outputs[1:2]]
    low.join("gather", [v for v in (*slots[:5], *slots[7:]) if v is not None], [total, *masks], node)
    stash = "float64" if table.dtype == "float64" else "float32"
    eps, out = float(attribute(node, "epsilon", SKIP_EPSILON)), low.output(node, shape, table.dtype)
    norm_stages(low, node, "layer_norm", total, gamma, beta, (len(shape) - 1,), eps, stash, out)


def _blocks_shape(node: ir.Node, slots: list[Value | None]) -> Shape | None:
    """Of GatherBlockQuantized, whose rows may be packed into bytes."""
    data, ids = slots[:2]
    bits, at = attribute(node, "bits", 4), attribute(node, "gather_axis", 0)
    if data is None or ids is None or not data.shape or ids.shape is None or bits not in (2, 4, 8):
        return None
    packed = 8 // bits if data.dtype == "uint8" else 1
    rows = [*data.shape[:-1], data.shape[-1] * packed if isinstance(data.shape[-1], int) else None]
    if not -len(rows) <= at < len(rows):
        return None
    at %= len(rows)
    return (*rows[:at], *ids.shape, *rows[at + 1 :])


def _broadcast_shape(node: ir.Node, slots: list[Value | None]) -> Shape | None:
    """Of sums and products of quantized tensors: (A, its scale and zero point, B, ...)."""
    a, b = slots[0], slots[3]
    return None if a is None or b is None else product_shape([a.shape, b.shape])


def _reordered_shape(node: ir.Node, slots: list[Value | None]) -> Shape | None:
    """Of ReorderInput, into blocks of channels, and ReorderOutput, out of them: how many each block has is the
    machine's business."""
    x = slots[0]
    if x is None or x.shape is None or len(x.shape) < 3:
        return None
    last = bool(attribute(node, "channels_last", 0))
    if node.op_type == "ReorderInput":
        return (x.shape[0], None, *(x.shape[1:-1] if last else x.shape[2:]))
    given = attribute(node, "channels", 0)
    channels = (given if given > 0 else None,)
    return (x.shape[0], *((*x.shape[2:], *channels) if last else (*channels, *x.shape[2:])))


def _upsampled_shape(node: ir.Node, slots: list[Value | None]) -> Shape | None:
    x, scales = slots[0], attribute(node, "scales") or ()
    if x is None or x.shape is None or len(scales) != len(x.shape) or any(c <= 0 for c in scales):
        return None
    return tuple(d if c == 1 else d * c if isinstance(d, int) else None for d, c in zip(x.shape, scales, strict=True))


CONTRIB: dict[str, Row] = {
    "com.microsoft::SimplifiedLayerNormalization": norm("rms_norm"),
    "com.microsoft::SkipSimplifiedLayerNormalization": skip_norm("rms_norm"),
    "com.microsoft::SkipLayerNormalization": skip_norm("layer_norm"),
    "com.microsoft::FusedMatMul": _fused_matmul,
    "com.microsoft::Attention": shaped("attention", _attention_shape),
    "com.microsoft::MultiHeadAttention": shaped("attention", _heads_shape, reads=_unpacked),
    "com.microsoft::GroupQueryAttention": shaped("attention", _heads_shape, reads=_unpacked),
    "com.microsoft::QAttention": shaped("attention", _attention_shape, 3),
    "com.microsoft::MatMulNBits": shaped("linear", _bits_shape),
    "com.microsoft::DynamicQuantizeMatMul": shaped("linear", _product_shape),
    "com.microsoft::MatMulIntegerToFloat": shaped("linear", _product_shape, 2),
    "com.microsoft::FusedGemm": shaped("linear", gemm_shape),
    "com.microsoft::EmbedLayerNormalization": _embedding,
    "com.microsoft::QEmbedLayerNormalization": shaped("gather", _embedded_shape, 8),
    "com.microsoft::GatherBlockQuantized": shaped("gather", _blocks_shape, 2),
    "com.microsoft::QLinearAdd": shaped("opaque", _broadcast_shape),
    "com.microsoft::QLinearMul": shaped("opaque", _broadcast_shape),
    **{f"com.microsoft::{name}": shaped("opaque", lambda node, slots: slots[0].shape if slots[0] else None)
       for name in ("RotaryEmbedding", "MoE", "QMoE")},
    **{f"com.microsoft::{name}": same_type("activation") for name in ("QuickGelu", "FastGelu", "BiasGelu", "Gelu")},
    **{name: role("linear") for name, like in LIKE.items() if like == "Conv"},
    **dict.fromkeys(("com.microsoft.nchwc::ReorderInput", "com.microsoft.nchwc::ReorderOutput"),
                    shaped("opaque", _reordered_shape)),
    "com.microsoft.nchwc::Upsample": shaped("opaque", _upsampled_shape),
    "com.microsoft::QuantizeLinear": quantize,
    "com.microsoft::DequantizeLinear": quantize,
}
"""As `onnx_ops.OPS`: operator with its domain -> how to lower it."""
