"""What ONNX operators do with the channels of a result: the front end's table for `normfuse.centring`.

A row is called as ``row(low, node, want)`` with the ONNX node and the centring wanted of its (only) result; it gives
the operands that have to be centred for that, and how.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from normfuse.centring import Blocked, Centre, Channels, Links
from normfuse.frontends.onnx import Lowering
from normfuse.frontends.onnx_fold import attribute
from normfuse.frontends.onnx_softmax import FIRST_SOFTMAX_OF_ONE_AXIS
from normfuse.graph import Node, Value
from normfuse.passes.fold_affine import Contraction, contraction

Row = Callable[[Lowering, ir.Node, Centre], Links]

QUANTISED = frozenset(
    """QuantizeLinear DequantizeLinear DynamicQuantizeLinear QLinearConv QLinearMatMul MatMulInteger ConvInteger
    MatMulNBits MatMulBnb4 MatMulFpQ4 QAttention QEmbedLayerNormalization QOrderedMatMul QGemm QLinearAdd QLinearMul
    DynamicQuantizeMatMul MatMulIntegerToFloat QMoE GatherBlockQuantized""".split()
)
RANDOM = frozenset("RandomNormal RandomNormalLike RandomUniform RandomUniformLike Bernoulli Multinomial".split())


def hazard(low: Lowering) -> str | None:
    """Why nothing of a graph may be converted: quantised weights, randomness, training."""
    for node in (node for part in low.parts() for node in part.source):
        name = f"{node.op_type} {node.name or ''}".strip()
        if node.op_type in QUANTISED:
            return f"the model is quantised ({name}): its scales hold for the values as they are"
        if node.op_type in RANDOM:
            return f"the graph draws random numbers ({name}), so that it cannot be compared with itself"
        if node.op_type == "Dropout" and len(node.inputs) > 2 and node.inputs[2] is not None:
            mode = low.array(node.inputs[2])
            if mode is None or bool(mode):
                return f"the graph is for training: {name} drops values at random"
        if node.op_type == "BatchNormalization" and attribute(node, "training_mode", 0):
            return f"the graph is for training: {name} takes statistics of the batch"
    return None


def channels(low: Lowering, node: Node, out: Value, want: Centre) -> Links | None:
    """The operands behind a result of a node of an ONNX graph; None for an operator that is not in the table."""
    native = node.native
    if not isinstance(native, ir.Node) or out.native is None or native.domain not in ("", "ai.onnx"):
        return None
    if native.op_type == "Split":
        x = low.value(native.inputs[0])
        found = span(low, node, out, want.axis)
        known = x.shape and _known(low, native)
        if found is not None and want.scales:
            raise Blocked(f"Split {native.name or ''} cuts out channels that are scaled")
        return [(x, want.moved(want.axis, 0 if found is None else found[0]))] if known else None
    row = ROWS.get(native.op_type)
    return None if row is None else row(low, native, want)


def span(low: Lowering, node: Node, out: Value, axis: int) -> tuple[int, int] | None:
    """Where along an axis of its operand a slice lies; None where it is no slice along it."""
    native = node.native
    if not isinstance(native, ir.Node) or native.op_type not in ("Slice", "Split", "Gather") or out.native is None:
        return None
    rank = low.value(native.inputs[0]).rank or 0
    if native.op_type == "Gather":
        return _picked(low, native, axis, rank)
    if native.op_type == "Split":
        sizes = [low.value(v).shape for v in native.outputs]
        if attribute(native, "axis", 0) % max(rank, 1) != axis or any(s is None for s in sizes):
            return None
        start = 0
        for v, shape in zip(native.outputs, sizes, strict=True):
            assert shape is not None
            size = shape[axis]
            if not isinstance(size, int):
                return None
            if v is out.native:
                return start, start + size
            start += size
        return None
    cuts = _cuts(low, native)
    found = None if cuts is None else cuts.get(axis)
    return None if found is None or found[2] != 1 else found[:2]


def _picked(low: Lowering, node: ir.Node, axis: int, rank: int) -> tuple[int, int] | None:
    """Of a Gather of one index along an axis, that."""
    index, shape = _array(low, node, 1), low.value(node.inputs[0]).shape
    if attribute(node, "axis", 0) % max(rank, 1) != axis or index is None or index.size != 1:
        return None
    size, at = None if shape is None else shape[axis], int(index.reshape(-1)[0])
    return (at % size, at % size + 1) if isinstance(size, int) and -size <= at < size else None


def blind(low: Lowering, node: Node, value: Value, want: Centre) -> bool:
    """A softmax along the axis gives the same whatever is added to its operand along it.

    Before opset 13 it is along all axes from `axis` on, together, and `axis` is 1 where it is not given.
    """
    native = node.native
    if not isinstance(native, ir.Node) or native.op_type not in ("Softmax", "LogSoftmax") or not want.whole(value):
        return False
    imports, rank = low.source.opset_imports, max(value.rank or 1, 1)
    together = imports.get("", imports.get("ai.onnx", 0)) < FIRST_SOFTMAX_OF_ONE_AXIS
    axis = attribute(native, "axis", 1 if together else -1) % rank
    return bool(axis == want.axis and (axis == rank - 1 or not together))


def linear(low: Lowering, node: Node, value: Value, axis: int, channels: Channels) -> Contraction | None:
    """The linear layer or unpadded convolution that a node is, over an axis of the value that it reads first."""
    native = node.native
    if not isinstance(native, ir.Node) or native.op_type not in ("MatMul", "Gemm", "Conv") or len(native.inputs) < 2:
        return None
    if native.inputs[0] is not value.native or native.inputs[1] is value.native or native.inputs[1] is None:
        return None
    weight, rank, kind = low.value(native.inputs[1]), value.rank or 0, native.op_type
    bias, out = low.value(native.inputs[2]) if _has(native, 2) else None, node.outputs[0]
    if kind == "MatMul":
        if axis != rank - 1 or weight.rank != 2:
            return None
        over, gives, after = 0, 1, node.outputs[0].uses
        if len(after) == 1 and after[0].kind == "add" and not node.outputs[0].kept:
            others = [v for v in after[0].inputs if v is not node.outputs[0]]
            if len(others) == 1 and others[0].rank == 1 and others[0].shape == (weight.shape or ())[1:]:
                bias, out = others[0], after[0].outputs[0]
    elif kind == "Gemm":
        if axis != 1 or attribute(native, "transA", 0) or attribute(native, "alpha", 1.0) != 1.0:
            return None
        over = 1 if attribute(native, "transB", 0) else 0
        gives = 1 - over
        if bias is not None and (attribute(native, "beta", 1.0) != 1.0 or bias.rank != 1):
            return None
    else:
        plain = not any(attribute(native, "pads", [])) and attribute(native, "auto_pad", "NOTSET")[:4] != "SAME"
        if axis != 1 or attribute(native, "group", 1) != 1 or not plain:
            return None
        over, gives = 1, 0
    return contraction(node, weight, over, gives, bias, channels, out)


# -- rows -------------------------------------------------------------------------------------------------------------


def _known(low: Lowering, node: ir.Node) -> bool:
    axis, rank = attribute(node, "axis", 0), low.value(node.inputs[0]).rank or 1
    shapes = [low.value(v).shape for v in node.outputs]
    return all(s is not None and isinstance(s[axis % rank], int) for s in shapes)


def _operand(low: Lowering, node: ir.Node, i: int) -> Value:
    found = node.inputs[i] if i < len(node.inputs) else None
    if found is None:
        raise Blocked(f"{node.op_type} {node.name or ''} lacks operand {i}")
    value = low.value(found)
    if value.shape is None:
        raise Blocked(f"the shape of {value.name} is not known")
    return value


def _has(node: ir.Node, i: int) -> bool:
    return i < len(node.inputs) and node.inputs[i] is not None


def _array(low: Lowering, node: ir.Node, i: int) -> Any:
    """The elements of a small constant operand, or None."""
    found = node.inputs[i] if i < len(node.inputs) else None
    return None if found is None else low.array(found)


def _rank(low: Lowering, node: ir.Node) -> int:
    return low.value(node.outputs[0]).rank or 0


def _matmul(low: Lowering, node: ir.Node, want: Centre) -> Links:
    a, b = _operand(low, node, 0), _operand(low, node, 1)
    rank = _rank(low, node)
    if want.axis == rank - 1 and (b.rank or 0) > 1:
        return [(b, want.moved((b.rank or 0) - 1))]
    if want.axis == rank - 2 and (a.rank or 0) > 1 and (b.rank or 0) > 1:
        return [(a, want.moved((a.rank or 0) - 2))]
    raise Blocked(f"MatMul {node.name or ''} has the channels as a batch axis")


def _gemm(low: Lowering, node: ir.Node, want: Centre) -> Links:
    if want.axis == 0:
        raise Blocked(f"Gemm {node.name or ''} has the channels as rows")
    links = [(_operand(low, node, 1), want.moved(0 if attribute(node, "transB", 0) else 1))]
    return links + _bias(low, node, 2, want)


def _bias(low: Lowering, node: ir.Node, i: int, want: Centre) -> Links:
    if not _has(node, i):
        return []
    bias = _operand(low, node, i)
    axis = (bias.rank or 0) - 1
    if axis < 0 or (bias.shape or (1,))[axis] == 1 or bias.number == 0:
        if bias.number == 0:
            return []
        raise Blocked(f"{node.op_type} {node.name or ''} adds one number to all channels")
    return [(bias, want.moved(axis))]


def _conv(axis: int) -> Row:
    def row(low: Lowering, node: ir.Node, want: Centre) -> Links:
        name = f"{node.op_type} {node.name or ''}"
        if attribute(node, "group", 1) != 1:
            raise Blocked(f"{name} works in groups of channels")
        if want.axis != 1:
            raise Blocked(f"{name} mixes positions along this axis")
        return [(_operand(low, node, 1), want.moved(axis)), *_bias(low, node, 2, want)]

    return row


def _gather(low: Lowering, node: ir.Node, want: Centre) -> Links:
    data, index = _operand(low, node, 0), _operand(low, node, 1)
    axis, rank = attribute(node, "axis", 0) % (data.rank or 1), index.rank or 0
    if want.axis < axis:
        return [(data, want)]
    if want.axis < axis + rank:
        raise Blocked(f"Gather {node.name or ''} picks the channels")
    return [(data, want.moved(want.axis - rank + 1))]


def _concat(low: Lowering, node: ir.Node, want: Centre) -> Links:
    axis = attribute(node, "axis", 0) % max(_rank(low, node), 1)
    values = [_operand(low, node, i) for i in range(len(node.inputs))]
    if axis != want.axis:
        return [(v, want) for v in values]
    links: Links = []
    start = 0
    for v in values:
        size = (v.shape or ())[axis]
        if not isinstance(size, int) or want.scales:
            raise Blocked(f"Concat {node.name or ''} joins channels of unknown number")
        blocks = want.within(start, start + size)
        if blocks is None:
            raise Blocked(f"Concat {node.name or ''} joins channels that are normalised together")
        if blocks:
            links.append((v, Centre(axis, tuple((s - start, n) for s, n in blocks))))
        start += size
    return links


def _where(low: Lowering, node: ir.Node, want: Centre) -> Links:
    mask, links = _operand(low, node, 0), []
    rank = _rank(low, node)
    if _carries(mask, rank, want.axis):
        raise Blocked(f"Where {node.name or ''} chooses channel by channel")
    for i in (1, 2):
        v = _operand(low, node, i)
        if v.number == 0:
            continue
        if not _carries(v, rank, want.axis):
            raise Blocked(f"Where {node.name or ''} fills all channels with one number")
        links.append((v, want.moved(want.axis - rank + (v.rank or 0))))
    return links


def _carries(value: Value, rank: int, axis: int) -> bool:
    at = axis - rank + (value.rank or 0)
    return at >= 0 and (value.shape or ())[at] != 1


def _cuts(low: Lowering, node: ir.Node) -> dict[int, tuple[int, int, int]] | None:
    """What a Slice keeps: (start, end, step) by axis, None where that is known only at run time."""
    x = low.value(node.inputs[0])
    if x.shape is None:
        return None
    given: list[Any] = [attribute(node, n) for n in ("starts", "ends", "axes", "steps")]
    if len(node.inputs) > 1:
        given = [_array(low, node, i) for i in range(1, 5)]
    starts, ends, axes, steps = (None if g is None else [int(n) for n in np.asarray(g).reshape(-1)] for g in given)
    if axes is None:
        axes = None if _has(node, 3) else list(range(len(starts or ends or x.shape)))
    if axes is None:
        return None
    out: dict[int, tuple[int, int, int]] = {}
    for i, axis in enumerate(axes):
        axis %= len(x.shape)
        size = x.shape[axis]
        if starts is None or ends is None or not isinstance(size, int):
            out[axis] = (0, 0, 0)  # not known
            continue
        start, end, step = starts[i], ends[i], 1 if steps is None else steps[i]
        start, end = (max(0, min(size, n + size if n < 0 else n)) for n in (start, end))
        out[axis] = (start, end, step)
    return out


def _slice(low: Lowering, node: ir.Node, want: Centre) -> Links:
    x, cuts = _operand(low, node, 0), _cuts(low, node)
    if cuts is None:
        raise Blocked(f"Slice {node.name or ''} cuts along axes known only at run time")
    if want.axis not in cuts:
        return [(x, want)]
    start, _, step = cuts[want.axis]
    if step != 1:
        raise Blocked(f"Slice {node.name or ''} picks the channels")
    if want.scales:
        raise Blocked(f"Slice {node.name or ''} cuts out channels that are scaled")
    return [(x, want.moved(want.axis, start))]


def _along(*axes: int) -> Row:
    """A linear map along other axes than the channels, such as pooling; `axes` are those that stay, from the front."""

    def row(low: Lowering, node: ir.Node, want: Centre) -> Links:
        if want.axis not in axes:
            raise Blocked(f"{node.op_type} {node.name or ''} mixes positions along this axis")
        return [(_operand(low, node, 0), want)]

    return row


def _resize(low: Lowering, node: ir.Node, want: Centre) -> Links:
    x, out = _operand(low, node, 0), low.value(node.outputs[0])
    if out.shape is None or x.shape is None or want.axis > 1 or x.shape[want.axis] != out.shape[want.axis]:
        raise Blocked(f"Resize {node.name or ''} mixes positions along this axis")
    at = 2 if len(node.inputs) > 2 else 1  # of opset 10
    if _has(node, at) and not _has(node, 3):
        scales, axes = _array(low, node, at), [a % len(x.shape) for a in attribute(node, "axes", range(len(x.shape)))]
        if scales is None or any(a == want.axis and scale != 1 for a, scale in zip(axes, scales, strict=False)):
            raise Blocked(f"Resize {node.name or ''} may move positions along this axis")
    if attribute(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize":
        raise Blocked(f"Resize {node.name or ''} fills with a number what lies outside")
    return [(x, want)]


def _pad(low: Lowering, node: ir.Node, want: Centre) -> Links:
    x = _operand(low, node, 0)
    pads = _array(low, node, 1) if _has(node, 1) else attribute(node, "pads")
    axes = _array(low, node, 3)
    if pads is None:
        raise Blocked(f"Pad {node.name or ''} pads by what is known only at run time")
    over = [int(a) % (x.rank or 1) for a in (range(len(pads) // 2) if axes is None else axes.reshape(-1))]
    mode = attribute(node, "mode", "constant")
    fill = low.value(node.inputs[2]).number if _has(node, 2) else attribute(node, "value", 0.0)
    if any(a == want.axis and (pads[i] or pads[i + len(over)]) for i, a in enumerate(over)):
        raise Blocked(f"Pad {node.name or ''} adds channels")
    if mode == "constant" and fill != 0:
        raise Blocked(f"Pad {node.name or ''} pads with another number than 0")
    return [(x, want)]


def _tile(low: Lowering, node: ir.Node, want: Centre) -> Links:
    repeats = _array(low, node, 1)
    if repeats is None or repeats.reshape(-1)[want.axis] != 1:
        raise Blocked(f"Tile {node.name or ''} repeats the channels")
    return [(_operand(low, node, 0), want)]


def _einsum(low: Lowering, node: ir.Node, want: Centre) -> Links:
    left, _, result = str(attribute(node, "equation")).replace(" ", "").partition("->")
    if "." in left or not result:
        raise Blocked(f"Einsum {node.name or ''} has an ellipsis")
    letter = result[want.axis]
    holders = [(i, term.index(letter)) for i, term in enumerate(left.split(",")) if letter in term]
    if len(holders) != 1 or left.split(",")[holders[0][0]].count(letter) != 1:
        raise Blocked(f"Einsum {node.name or ''} multiplies two values channel by channel")
    return [(_operand(low, node, holders[0][0]), want.moved(holders[0][1]))]


def _gather_nd(low: Lowering, node: ir.Node, want: Centre) -> Links:
    data, index = _operand(low, node, 0), _operand(low, node, 1)
    last = (index.shape or (None,))[-1]
    if not isinstance(last, int):
        raise Blocked(f"GatherND {node.name or ''} picks along axes known only at run time")
    picked = last + int(attribute(node, "batch_dims", 0))
    axis = want.axis - _rank(low, node) + (data.rank or 0)
    if axis < picked:
        raise Blocked(f"GatherND {node.name or ''} picks the channels")
    return [(data, want.moved(axis))]


def _gather_elements(low: Lowering, node: ir.Node, want: Centre) -> Links:
    data = _operand(low, node, 0)
    if attribute(node, "axis", 0) % (data.rank or 1) == want.axis or not _spread(low, node, want):
        raise Blocked(f"GatherElements {node.name or ''} picks channel by channel")
    return [(data, want)]


def _scatter_elements(low: Lowering, node: ir.Node, want: Centre) -> Links:
    """Into the same rows of all channels."""
    data, updates = _operand(low, node, 0), _operand(low, node, 2)
    size = (data.shape or ())[want.axis]
    whole = isinstance(size, int) and size == (updates.shape or ())[want.axis]
    along = attribute(node, "axis", 0) % (data.rank or 1) == want.axis
    plain = attribute(node, "reduction", "none") in ("none", "add")
    if along or not whole or not plain or not _spread(low, node, want):
        raise Blocked(f"{node.op_type} {node.name or ''} writes channel by channel")
    return [(updates, want)] if data.number == 0 else [(data, want), (updates, want)]


def _spread(low: Lowering, node: ir.Node, want: Centre) -> bool:
    """Whether the index of a node is one that was repeated for all channels."""
    index = node.inputs[1]
    maker = index.producer() if index is not None else None
    source = low.value(maker.inputs[0]) if maker is not None and maker.op_type in ("Expand", "Tile") else None
    back = _rank(low, node) - want.axis
    return source is not None and source.shape is not None and (
        len(source.shape) < back or source.shape[-back] == 1)  # fmt: skip


def _cumsum(low: Lowering, node: ir.Node, want: Centre) -> Links:
    axis = _array(low, node, 1)
    if axis is None or int(axis.reshape(-1)[0]) % _rank(low, node) == want.axis:
        raise Blocked(f"CumSum {node.name or ''} adds the channels up")
    return [(_operand(low, node, 0), want)]


def _scatter_nd(low: Lowering, node: ir.Node, want: Centre) -> Links:
    data, index, updates = (_operand(low, node, i) for i in range(3))
    last = (index.shape or (None,))[-1]
    if not isinstance(last, int) or want.axis < last or attribute(node, "reduction", "none") not in ("none", "add"):
        raise Blocked(f"ScatterND {node.name or ''} writes into the channels")
    links = [(updates, want.moved(want.axis - (data.rank or 0) + (updates.rank or 0)))]
    return links if data.number == 0 else [(data, want), *links]


ROWS: dict[str, Row] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv(0),
    "ConvTranspose": _conv(1),
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ScatterND": _scatter_nd,
    "ScatterElements": _scatter_elements,
    "CumSum": _cumsum,
    "Concat": _concat,
    "Where": _where,
    "Slice": _slice,
    "AveragePool": _along(0, 1),
    "GlobalAveragePool": _along(0, 1),
    "Resize": _resize,
    "Pad": _pad,
    "Tile": _tile,
    "Einsum": _einsum,
}
"""ONNX operator -> the operands to centre."""
