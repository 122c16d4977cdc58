"""What torch operators that pick, move, join and spread parts of a value do with its channels: rows of
`fx_channels`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch._ops import OpOverload

from normfuse.centring import Blocked, Centre, Links
from normfuse.frontends.fx import Lowering
from normfuse.frontends.fx_call import Arguments, by_name
from normfuse.frontends.fx_effects import name_of
from normfuse.frontends.fx_meta import is_tensor, meta_of
from normfuse.graph import Shape, Value


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


def cut(at: At) -> tuple[Value, dict[int, tuple[int, int, int]], list[int]] | None:
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
    found = cut(at)
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


def _items(at: At) -> tuple[Any, ...]:
    index = at.get(1)
    return index if isinstance(index, tuple) else (index,)


PICKS: dict[str, Row] = by_name(
    {
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
    }
)  # fmt: skip
"""Bare name of a torch function, method or aten operator -> the operands to centre."""
