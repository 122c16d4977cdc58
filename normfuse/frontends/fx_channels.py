"""What torch operators do with the channels of a result: the front end's table for `normfuse.centring`.

A row is called as ``row(at, want)`` with the node's arguments and the centring wanted of its result; it gives the
operands that have to be centred for that, and how. Functions, methods and aten overloads share a row by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload

from normfuse.centring import Blocked, Centre, Channels, Links
from normfuse.frontends.fx import Lowering
from normfuse.frontends.fx_call import Arguments, by_name
from normfuse.frontends.fx_effects import name_of
from normfuse.frontends.fx_meta import is_tensor, meta_of
from normfuse.graph import Node, Shape, Value
from normfuse.passes.fold_affine import Contraction, contraction

RANDOM = frozenset(
    """rand rand_like randn randn_like randint randint_like randperm bernoulli bernoulli_ multinomial normal normal_
    uniform_ exponential_ rrelu""".split()
)
CONTRACTIONS = frozenset("linear addmm mm matmul __matmul__ conv1d conv2d conv3d convolution".split())
DROPOUT = frozenset("dropout dropout_ native_dropout alpha_dropout feature_dropout".split())
QUANTISED = ("quantized", "quantized_decomposed", "torchao", "torch_ao")


class At(Arguments):
    """The arguments of one node, by position or name, for one of its results."""

    def __init__(self, low: Lowering, node: fx.Node, out: Value, index: int) -> None:
        self.low, self.node, self.out, self.index = low, node, out, index
        self.aten = isinstance(node.target, OpOverload)

    def tensor(self, i: int, *names: str) -> Value:
        """A tensor operand; raises `Blocked` where it is none of known rank."""
        return self.value(self.get(i, *names))

    def value(self, argument: Any) -> Value:
        """The neutral value of an argument."""
        found = self.low.operand(argument) if isinstance(argument, fx.Node) else None
        if found is None or found.shape is None:
            raise self.blocked("has an operand about which nothing is known")
        return found

    @property
    def rank(self) -> int:
        return self.out.rank or 0

    def blocked(self, why: str) -> Blocked:
        """The refusal of a row."""
        return Blocked(f"{name_of(self.node) or self.node.target} {self.node.name} {why}")

    def axis(self, i: int, *names: str, rank: int) -> int:
        """An argument that is an axis, counted from the front."""
        found = self.get(i, *names, default=0)
        if not isinstance(found, int):
            raise self.blocked("has an axis known only at run time")
        return found % max(rank, 1)


Row = Callable[[At, Centre], Links]


def hazard(graph: fx.Graph, module: nn.Module) -> str | None:
    """Why nothing of a graph may be converted: quantised weights, randomness, training."""
    for node in graph.nodes:
        name = name_of(node) or ""
        space, _, bare = name.rpartition("::")
        if space in QUANTISED or "quantize" in bare or bare.startswith("_weight_int"):
            return f"the model is quantised ({node.name}): its scales hold for the values as they are"
        if bare in RANDOM:
            return f"the graph draws random numbers ({node.name}), so that it cannot be compared with itself"
        if bare in DROPOUT:
            p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
            train = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", node.kwargs.get("train", True))
            if train is not False and p != 0:
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
        found = _cut(at)
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


def _same_but(*names: str, at_index: int, default: int | None = 0) -> Row:
    """An operator that moves or adds up positions along one axis, or several, and keeps the others."""
    def row(at: At, want: Centre) -> Links:
        x = at.tensor(0, "input", "self")
        given = at.get(at_index, *names, default=default)
        axes = given if isinstance(given, (tuple, list)) else [given]
        if not all(isinstance(a, int) for a in axes) or want.axis in {a % max(x.rank or 1, 1) for a in axes}:
            raise at.blocked("mixes the channels")
        return [(x, want)]

    return row


def _roll(at: At, want: Centre) -> Links:
    if at.get(2, "dims") in (None, (), []):
        raise at.blocked("rolls over all positions, the channels among them")
    return _same_but("dims", at_index=2)(at, want)


def _cut(at: At) -> tuple[Value, dict[int, tuple[int, int, int]], list[int]] | None:
    """Of a slice: its operand, (start, size, step) along the axes that it cuts, and the operand's axis under each of
    the result's, -1 for a new one. Raises `Blocked`; None for what is no slice."""
    name = name_of(at.node) or ""
    x = at.tensor(0, "input", "self", "tensor")
    rank, shape = x.rank or 0, x.shape or ()
    axes = list(range(rank))

    def ends(axis: int, start: Any, end: Any, step: Any = 1) -> tuple[int, int, int]:
        size = shape[axis]
        start, step = 0 if start is None else start, 1 if step is None else step
        if not all(isinstance(v, int) for v in (start, size, step)) or not (end is None or isinstance(end, int)):
            return 0, 0, 0
        assert isinstance(size, int)
        start, stop = (max(0, min(size, v + size if v < 0 else v)) for v in (start, size if end is None else end))
        return start, max(stop - start, 0), step

    def one(axis: int, index: Any) -> tuple[int, int, int]:
        size = shape[axis]
        known = isinstance(index, int) and isinstance(size, int) and -size <= index < size
        return (index % size, 1, 1) if known else (0, 0, 0)

    if name == "slice":
        axis = at.axis(1, "dim", rank=rank)
        return x, {axis: ends(axis, at.get(2, "start"), at.get(3, "end"), at.get(4, "step"))}, axes
    if name == "narrow":
        axis, start, length = at.axis(1, "dim", rank=rank), at.get(2, "start"), at.get(3, "length")
        known = isinstance(start, int) and isinstance(length, int)
        return x, {axis: ends(axis, start, start + length) if known else (0, 0, 0)}, axes
    if name in ("select", "unbind"):
        axis = at.axis(1, "dim", rank=rank)
        index = at.get(2, "index") if name == "select" else at.index
        return x, {axis: one(axis, index)}, [a for a in axes if a != axis]
    if name in ("split", "split_with_sizes", "chunk", "tensor_split"):
        axis = at.axis(2, "dim", rank=rank)
        parts = [v.shape for v in _results(at)]
        sizes = [s[axis] if s is not None else None for s in parts]
        if not all(isinstance(s, int) for s in sizes):
            return x, {axis: (0, 0, 0)}, axes
        return x, {axis: (sum(s for s in sizes[: at.index] if isinstance(s, int)), _number(sizes[at.index]), 1)}, axes
    if name not in ("getitem", "__getitem__"):
        return None
    index = at.get(1)
    items = list(index) if isinstance(index, tuple) else [index]
    taken = sum(isinstance(i, (int, slice)) for i in items)
    if any(not (i is None or i is Ellipsis or isinstance(i, (int, slice))) for i in items):
        raise at.blocked("picks by a tensor")
    cuts: dict[int, tuple[int, int, int]] = {}
    under: list[int] = []
    axis = 0
    for item in items:
        if item is None:
            under.append(-1)
        elif item is Ellipsis:
            under += range(axis, axis + rank - taken)
            axis += rank - taken
        elif isinstance(item, int):
            cuts[axis] = one(axis, item)
            axis += 1
        else:
            if item != slice(None):
                cuts[axis] = ends(axis, item.start, item.stop, item.step)
            under.append(axis)
            axis += 1
    return x, cuts, under + list(range(axis, rank))


def _results(at: At) -> list[Value]:
    slot = at.low.values.get(at.node)
    return [v for v in slot if v is not None] if isinstance(slot, tuple) else []


def _number(size: Any) -> int:
    return size if isinstance(size, int) else 0


def _slice(at: At, want: Centre) -> Links:
    found = _cut(at)
    if found is None or want.axis >= len(found[2]) or found[2][want.axis] < 0:
        raise at.blocked("picks the channels")
    x, cuts, under = found
    axis = under[want.axis]
    if axis not in cuts:
        return [(x, want.moved(axis))]
    start, _, step = cuts[axis]
    if step != 1:
        raise at.blocked("picks the channels")
    if want.scales:
        raise at.blocked("cuts out channels that are scaled")
    return [(x, want.moved(axis, start))]


def _cat(at: At, want: Centre) -> Links:
    listed = at.get(0, "tensors")
    values = [at.value(v) for v in listed] if isinstance(listed, (tuple, list)) else []
    axis = at.axis(1, "dim", "axis", rank=at.rank)
    if name_of(at.node) == "stack":
        if axis == want.axis:
            raise at.blocked("makes the channels out of several values")
        return [(v, want.moved(want.axis - (want.axis > axis))) for v in values]
    if axis != want.axis:
        return [(v, want) for v in values]
    links: Links = []
    start = 0
    for v in values:
        size = (v.shape or ())[axis]
        blocks = want.within(start, start + size) if isinstance(size, int) and not want.scales else None
        if blocks is None:
            raise at.blocked("joins channels that are normalised together")
        if blocks:
            links.append((v, Centre(axis, tuple((s - start, n) for s, n in blocks))))
        start += _number(size)
    return links


def _carries(shape: Shape, rank: int, axis: int) -> bool:
    at = axis - rank + len(shape)
    return at >= 0 and shape[at] != 1


def _where(at: At, want: Centre) -> Links:
    filled = name_of(at.node) == "masked_fill"
    mask = at.tensor(1, "mask") if filled else at.tensor(0, "condition", "self")
    if _carries(mask.shape or (), at.rank, want.axis):
        raise at.blocked("chooses channel by channel")
    links: Links = []
    for argument in (at.get(0, "input", "self"), at.get(2, "value")) if filled else (at.get(1, "input", "self"),
                                                                                   at.get(2, "other")):  # fmt: skip
        if isinstance(argument, (int, float)):
            if argument != 0:
                raise at.blocked("fills all channels with one number")
            continue
        v = at.value(argument)
        if v.number == 0:
            continue
        if not _carries(v.shape or (), at.rank, want.axis):
            raise at.blocked("fills all channels with one number")
        links.append((v, want.moved(want.axis - at.rank + (v.rank or 0))))
    return links


def _pool(count: int) -> Row:
    """Averages and resampling over the last axes."""
    def row(at: At, want: Centre) -> Links:
        if want.axis >= at.rank - count:
            raise at.blocked("mixes positions along this axis")
        return [(at.tensor(0, "input", "self"), want)]

    return row


def _interpolate(at: At, want: Centre) -> Links:
    if want.axis > 1:
        raise at.blocked("mixes positions along this axis")
    return [(at.tensor(0, "input"), want)]


def _pad(at: At, want: Centre) -> Links:
    x, pads = at.tensor(0, "input", "self"), at.get(1, "pad")
    plain = name_of(at.node) == "constant_pad_nd"
    mode = "constant" if plain else at.get(2, "mode", default="constant")
    fill = at.get(2 if plain else 3, "value", default=0)
    behind = 2 * (at.rank - 1 - want.axis)  # the last axis comes first
    if not isinstance(pads, (tuple, list)) or any(p != 0 for p in pads[behind : behind + 2]):
        raise at.blocked("pads the channels")
    if mode == "constant" and fill not in (0, None):
        raise at.blocked("pads with another number than 0")
    return [(x, want)]


def _index(at: At, want: Centre) -> Links:
    x, given = at.tensor(0, "input", "self"), at.get(1, "indices")
    if name_of(at.node) in ("getitem", "__getitem__"):
        index = given if given is not None else at.get(1)
        given = [None if i == slice(None) else i for i in (index if isinstance(index, tuple) else (index,))]
    if not isinstance(given, (tuple, list)):
        raise at.blocked("picks by what is not known")
    places = [i for i, v in enumerate(given) if v is not None]
    if not places or places != list(range(places[0], places[-1] + 1)):
        raise at.blocked("picks along several axes")
    index_values = [at.value(given[i]) for i in places]
    if any(v.dtype == "bool" for v in index_values):
        raise at.blocked("picks by a mask")
    width = max(v.rank or 0 for v in index_values)
    first, last = places[0], places[-1]
    if want.axis < first:
        return [(x, want)]
    if want.axis < first + width:
        raise at.blocked("picks the channels")
    return [(x, want.moved(want.axis - width + last - first + 1))]


def _index_select(at: At, want: Centre) -> Links:
    x = at.tensor(0, "input", "self")
    if at.axis(1, "dim", rank=x.rank or 0) == want.axis:
        raise at.blocked("picks the channels")
    return [(x, want)]


def _gather(at: At, want: Centre) -> Links:
    """Picks along one axis, the same for all channels: the index is one that was spread over them."""
    x, index = at.tensor(0, "input", "self"), at.get(2, "index")
    if at.axis(1, "dim", rank=x.rank or 0) == want.axis or not _spread(index, at.rank - want.axis):
        raise at.blocked("picks channel by channel")
    return [(x, want)]


def _take_along(at: At, want: Centre) -> Links:
    """The same, where the index may also be of size 1 along the channels, and is broadcast."""
    x, index = at.tensor(0, "input", "self"), at.tensor(1, "indices")
    broadcast = (index.shape or ())[want.axis] == 1 if index.rank == x.rank == at.rank else False
    spread = broadcast or _spread(at.get(1, "indices"), at.rank - want.axis)
    if at.axis(2, "dim", rank=at.rank) == want.axis or not spread:
        raise at.blocked("picks channel by channel")
    return [(x, want)]


def _spread(index: Any, back: int) -> bool:
    """Whether a node repeats what has size 1 along an axis, the `back`th from behind."""
    if not isinstance(index, fx.Node) or not isinstance(index.args[0] if index.args else None, fx.Node):
        return False
    meta = meta_of(index.args[0])  # type: ignore[arg-type]
    if name_of(index) not in ("expand", "expand_as", "broadcast_to", "repeat", "tile") or not is_tensor(meta):
        return False
    return len(meta.shape) < back or meta.shape[-back] == 1


def _scatter(at: At, want: Centre) -> Links:
    """Into the same rows of all channels: the index is one that was spread over them."""
    x, source, index = at.tensor(0, "input", "self"), at.tensor(3, "src"), at.tensor(2, "index")
    sizes = {(v.shape or ())[want.axis] for v in (x, source, index)}
    whole = len(sizes) == 1 and all(isinstance(n, int) for n in sizes)
    along = at.axis(1, "dim", rank=x.rank or 0) == want.axis
    if along or not whole or at.get(4, "reduce") is not None or not _spread(at.get(2, "index"), at.rank - want.axis):
        raise at.blocked("writes channel by channel")
    return [(source, want)] if x.number == 0 else [(x, want), (source, want)]


def _lerp(at: At, want: Centre) -> Links:
    """start + weight * (end - start) for one weight."""
    start, end = at.tensor(0, "input", "self"), at.tensor(1, "end")
    if isinstance(at.get(2, "weight"), fx.Node) or not start.shape == end.shape == at.out.shape:
        raise at.blocked("scales the channels by what is computed, or spreads what it scales")
    return [(start, want), (end, want)]


def _index_add(at: At, want: Centre) -> Links:
    """Into some rows; so does index_copy."""
    x, source = at.tensor(0, "input", "self"), at.tensor(3, "source", "src")
    if at.axis(1, "dim", rank=x.rank or 0) == want.axis:
        raise at.blocked("adds into the channels")
    return [(source, want)] if x.number == 0 else [(x, want), (source, want)]


def _repeat(at: At, want: Centre) -> Links:
    x, given = at.tensor(0, "input", "self"), at.get(1, "repeats", "dims", "sizes")
    repeats = list(given) if isinstance(given, (tuple, list)) else list(at.node.args[1:])
    repeats = [1] * (at.rank - len(repeats)) + repeats  # which `tile` may leave out
    if repeats[want.axis] != 1:
        raise at.blocked("repeats the channels")
    axis = want.axis - at.rank + (x.rank or 0)
    if axis < 0:
        raise at.blocked("repeats the channels")
    return [(x, want.moved(axis))]


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


ROWS: dict[str, Row] = by_name(
    {
        "linear": _linear,
        "matmul __matmul__ mm bmm": _matmul,
        "addmm baddbmm": _addmm,
        "grouped_mm _grouped_mm transformers::grouped_mm_fallback": _grouped,
        "conv1d conv2d conv3d convolution": _conv(),
        "conv_transpose1d conv_transpose2d conv_transpose3d": _conv(transposed=True),
        "embedding": _embedding,
        "slice narrow select unbind split split_with_sizes chunk tensor_split": _slice,
        "getitem __getitem__": lambda at, want: (
            _index(at, want) if any(isinstance(i, fx.Node) for i in _items(at)) else _slice(at, want)),
        "cat concat concatenate stack": _cat,
        "where masked_fill": _where,
        "index": _index,
        "index_select": _index_select,
        "gather": _gather,
        "take_along_dim": _take_along,
        "index_add index_add_ index_copy": _index_add,
        "scatter scatter_add": _scatter,
        "lerp": _lerp,
        "roll": _roll,
        "flip": _same_but("dims", at_index=1),
        "cumsum": _same_but("dim", at_index=1),
        "repeat_interleave": _same_but("dim", at_index=2, default=None),
        "repeat tile": _repeat,
        "pad constant_pad_nd": _pad,
        "avg_pool1d adaptive_avg_pool1d": _pool(1),
        "avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d":
            _pool(2),
        "interpolate": _interpolate,
        "einsum": _einsum,
        "detach": lambda at, want: [(at.tensor(0, "input", "self"), want)],
        "scaled_dot_product_attention": _attention,
    }
)  # fmt: skip
"""Bare name of a torch function, method or aten operator -> the operands to centre."""


def _items(at: At) -> tuple[Any, ...]:
    index = at.get(1)
    return index if isinstance(index, tuple) else (index,)


def floating(value: Value) -> bool:
    """Whether a value is a node of the graph that gives one float tensor."""
    meta = meta_of(value.native) if isinstance(value.native, fx.Node) else None
    return isinstance(meta, torch.Tensor) and is_tensor(meta) and meta.is_floating_point()
