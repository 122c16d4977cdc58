"""What torch operators do with the channels of a result: the front end's table for `normfuse.centring`.

A row is called as ``row(at, want)`` with the node's arguments and the centring wanted of its result; it gives the
operands that have to be centred for that, and how. Functions, methods and aten overloads share a row by name.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from normfuse.centring import Blocked, Centre, Channels, Links
from normfuse.frontends.fx import Lowering
from normfuse.frontends.fx_call import by_name
from normfuse.frontends.fx_effects import RANDOM, drops, name_of
from normfuse.frontends.fx_meta import is_tensor, meta_of
from normfuse.frontends.fx_picks import PICKS, At, Row, cut
from normfuse.graph import Node, Value
from normfuse.passes.fold_affine import Contraction, contraction

CONTRACTIONS = frozenset("linear addmm mm matmul __matmul__ conv1d conv2d conv3d convolution".split())
QUANTISED = ("quantized", "quantized_decomposed", "torchao", "torch_ao")


def hazard(graph: fx.Graph, module: nn.Module) -> str | None:
    """Why nothing of a graph may be converted: quantised weights, randomness, training."""
    for node in graph.nodes:
        name = name_of(node) or ""
        space, _, bare = name.rpartition("::")
        if space in QUANTISED or "quantize" in bare or bare.startswith("_weight_int"):
            return f"the model is quantised ({node.name}): its scales hold for the values as they are"
        if bare in RANDOM:
            return f"the graph draws random numbers ({node.name}), so that it cannot be compared with itself"
        if drops(node):
            return f"the graph is for training: {node.name} drops values at random"
        if node.op == "call_module":
            part = module.get_submodule(str(node.target))
            if isinstance(part, nn.Dropout) and part.training and part.p > 0:
                return f"the graph is for training: {node.name} drops values at random"
    return None


def _at(low: Lowering, node: Node, out: Value) -> At | None:
    native = node.native
    if not isinstance(native, fx.Node) or native.op not in ("call_function", "call_method"):
        return None
    return At(low, native, out, node.outputs.index(out))


def channels(low: Lowering, node: Node, out: Value, want: Centre) -> Links | None:
    """The operands behind a result of a node of a torch graph; None for an operator that is not in the table."""
    at = _at(low, node, out)
    row = None if at is None else ROWS.get(name_of(at.node) or "")
    return None if row is None or at is None or out.shape is None else row(at, want)


def span(low: Lowering, node: Node, out: Value, axis: int) -> tuple[int, int] | None:
    """Where along an axis of its operand a slice lies; None where it is no slice along it."""
    at = _at(low, node, out)
    if at is None or node.kind != "slice":
        return None
    try:
        found = cut(at)
    except Blocked:
        return None
    if found is None or axis not in found[1]:
        return None
    start, size, step = found[1][axis]
    return (start, start + size) if step == 1 else None


def blind(low: Lowering, node: Node, value: Value, want: Centre) -> bool:
    """A softmax along the axis gives the same whatever is added to its operand along it."""
    native = node.native
    if not isinstance(native, fx.Node) or name_of(native) not in ("softmax", "_softmax", "log_softmax", "_log_softmax"):
        return False
    dim = native.args[1] if len(native.args) > 1 else native.kwargs.get("dim")
    return isinstance(dim, int) and dim % max(value.rank or 1, 1) == want.axis and want.whole(value)


def linear(low: Lowering, node: Node, value: Value, axis: int, channels: Channels) -> Contraction | None:
    """The linear layer or unpadded convolution that a node is, over an axis of the value that it reads."""
    at, rank = _at(low, node, node.outputs[0]) if node.outputs else None, value.rank or 0
    name = "" if at is None else name_of(at.node) or ""
    if at is None or name not in CONTRACTIONS:
        return None
    try:
        if name == "linear":
            x, weight, bias = at.tensor(0, "input"), at.tensor(1, "weight"), _optional(at, 2, "bias")
            over, gives, fits = 1, 0, axis == rank - 1 and weight.rank == 2
        elif name == "addmm":
            plain = at.get(-1, "alpha", default=1) == 1 and at.get(-1, "beta", default=1) == 1
            x, weight, bias = at.tensor(1, "mat1"), at.tensor(2, "mat2"), at.tensor(0, "input", "self")
            over, gives, fits = 0, 1, axis == 1 and plain
        elif name.startswith("conv"):
            x, weight, bias = at.tensor(0, "input"), at.tensor(1, "weight"), _optional(at, 2, "bias")
            general = name == "convolution"
            groups, pad = at.get(8 if general else 6, "groups", default=1), at.get(4, "padding", default=0)
            unpadded = pad == "valid" or not any(pad if isinstance(pad, (tuple, list)) else [pad])
            over, gives = 1, 0
            fits = axis == 1 and rank == weight.rank and groups == 1 and unpadded and not (
                general and at.get(6, "transposed"))
        else:
            x, weight, bias, over, gives = at.tensor(0, "input", "self"), at.tensor(1, "other", "mat2"), None, 0, 1
            fits = axis == rank - 1 and weight.rank == 2
    except Blocked:
        return None
    fits = fits and x is value and weight is not value
    return contraction(node, weight, over, gives, bias, channels) if fits else None


# -- rows -------------------------------------------------------------------------------------------------------------


def _bias(at: At, value: Value | None, want: Centre) -> Links:
    if value is None or value.number == 0:
        return []
    if not value.shape or value.shape[-1] == 1:
        raise at.blocked("adds one number to all channels")
    return [(value, want.moved(len(value.shape) - 1))]


def _optional(at: At, i: int, *names: str) -> Value | None:
    found = at.get(i, *names)
    return None if found is None else at.value(found)


def _linear(at: At, want: Centre) -> Links:
    if want.axis != at.rank - 1:
        raise at.blocked("has the channels as rows")
    weight = at.tensor(1, "weight")
    if weight.rank != 2:
        raise at.blocked("has one channel")
    return [(weight, want.moved(0)), *_bias(at, _optional(at, 2, "bias"), want)]


def _matmul(at: At, want: Centre) -> Links:
    a, b = at.tensor(0, "input", "self"), at.tensor(1, "other", "mat2")
    if want.axis == at.rank - 1 and (b.rank or 0) > 1:
        return [(b, want.moved((b.rank or 0) - 1))]
    if want.axis == at.rank - 2 and (a.rank or 0) > 1 and (b.rank or 0) > 1:
        return [(a, want.moved((a.rank or 0) - 2))]
    raise at.blocked("has the channels as a batch axis")


def _addmm(at: At, want: Centre) -> Links:
    w = at.tensor(2, "mat2", "batch2")
    if want.axis != at.rank - 1:
        raise at.blocked("has the channels as rows")
    return [(w, want.moved((w.rank or 0) - 1)), *_bias(at, at.tensor(0, "input", "self"), want)]


def _grouped(at: At, want: Centre) -> Links:
    """Rows times one matrix of several each: mixtures of experts."""
    x, w = at.tensor(0, "input", "self", "mat_a"), at.tensor(1, "weight", "mat2", "mat_b")
    if (x.rank, w.rank, at.rank) != (2, 3, 2) or want.axis != 1 or at.get(3, "bias") is not None:
        raise at.blocked("has the channels as rows")
    return [(w, want.moved(2))]


def _conv(transposed: bool = False) -> Row:
    def row(at: At, want: Centre) -> Links:
        general = name_of(at.node) == "convolution"
        turned = bool(at.get(6, "transposed", default=False)) if general else transposed
        groups = at.get(8, "groups", default=1) if general else at.get(6, "groups", default=1)
        if groups != 1:
            raise at.blocked("works in groups of channels")
        w, bias = at.tensor(1, "weight"), _optional(at, 2, "bias")
        if at.rank != (w.rank or 0) or want.axis != 1:
            raise at.blocked("mixes positions along this axis")
        return [(w, want.moved(1 if turned else 0)), *_bias(at, bias, want)]

    return row


def _embedding(at: At, want: Centre) -> Links:
    table = at.tensor(0, "weight") if at.aten else at.tensor(1, "weight")
    if not at.aten and at.get(3, "max_norm") is not None:
        raise at.blocked("rescales the rows that it picks (max_norm)")
    if want.axis != at.rank - 1:
        raise at.blocked("picks the channels")
    return [(table, want.moved(1))]


def _einsum(at: At, want: Centre) -> Links:
    rest = list(at.node.args[1:])
    rest = list(rest[0]) if rest and isinstance(rest[0], (tuple, list)) else rest
    left, _, result = str(at.get(0, "equation")).replace(" ", "").partition("->")
    terms = left.split(",")
    if "." in left or len(result) <= want.axis or len(terms) != len(rest):
        raise at.blocked("has an equation that is not followed")
    letter = result[want.axis]
    holders = [(i, t.index(letter)) for i, t in enumerate(terms) if letter in t]
    if len(holders) != 1 or terms[holders[0][0]].count(letter) != 1:
        raise at.blocked("multiplies two values channel by channel")
    return [(at.value(rest[holders[0][0]]), want.moved(holders[0][1]))]


def _attention(at: At, want: Centre) -> Links:
    v = at.tensor(2, "value")
    if want.axis != at.rank - 1:
        raise at.blocked("mixes positions along this axis")
    return [(v, want.moved((v.rank or 0) - 1))]


ROWS: dict[str, Row] = PICKS | by_name(
    {
        "linear": _linear,
        "matmul __matmul__ mm bmm": _matmul,
        "addmm baddbmm": _addmm,
        "grouped_mm _grouped_mm transformers::grouped_mm_fallback": _grouped,
        "conv1d conv2d conv3d convolution": _conv(),
        "conv_transpose1d conv_transpose2d conv_transpose3d": _conv(transposed=True),
        "embedding": _embedding,
        "einsum": _einsum,
        "detach": lambda at, want: [(at.tensor(0, "input", "self"), want)],
        "scaled_dot_product_attention": _attention,
    }
)
"""Bare name of a torch function, method or aten operator -> the operands to centre."""


def floating(value: Value) -> bool:
    """Whether a value is a node of the graph that gives one float tensor."""
    meta = meta_of(value.native) if isinstance(value.native, fx.Node) else None
    return isinstance(meta, torch.Tensor) and is_tensor(meta) and meta.is_floating_point()
