"""How "its mean along this axis is taken away" passes backward through one node, from its result to its operands.

Let P be the projector I - 11'/d on an axis of a value, or on blocks of that axis (one per head). A node whose result is
linear in some operands jointly, channel by channel, gives P(result) when these operands are given as P(operand):
additions, casts, views, the weight and the bias of a linear layer, the table of an embedding. `back` says which these
are, or why there are none. What native operators do is the front end's table (`Channels`); what the neutral kinds
do stands here.

A factor per channel that is a constant (LayerScale) commutes with nothing, so it is handed on: `scales` are to be
multiplied into the constants before their mean is taken away, and the multiplication itself goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

from normfuse.facts import MEAN, Refused, add, has, mul
from normfuse.graph import FLOATS, Node, Shape, Value
from normfuse.recognise import Recognition
from normfuse.transfer import identity_layout

Block = tuple[int, int]
Part = tuple[int, tuple[int, ...]] | None
WIDER = {(half, wide) for half in ("float16", "bfloat16") for wide in ("float32", "float64")} | {("float32", "float64")}
"""Casts that change no number."""


@dataclass(frozen=True, slots=True)
class Centre:
    """A value with its mean along `axis` taken away in each of the `blocks` (start, length), scaled before that.

    With `only`, (another axis, indices), that is so at these indices alone: of query, key and value side by side, which
    are taken apart, at the query's and the key's.
    """

    axis: int
    blocks: tuple[Block, ...]
    scales: tuple[Value, ...] = ()
    only: Part = None

    def whole(self, value: Value) -> bool:
        """Whether one block is the whole axis of a value, and nothing is to be scaled: P in the plain sense."""
        size = value.shape[self.axis] if value.shape is not None else None
        return self.blocks == ((0, size),) and not self.scales and self.only is None

    def moved(self, axis: int, by: int = 0) -> Centre:
        """The same on another axis, each block shifted."""
        return replace(self, axis=axis, blocks=tuple((s + by, n) for s, n in self.blocks))

    def within(self, low: int, high: int) -> tuple[Block, ...] | None:
        """The blocks that lie in a range; None where one lies in it only in part."""
        inside = tuple((s, n) for s, n in self.blocks if s < high and s + n > low)
        return inside if all(low <= s and s + n <= high for s, n in inside) else None


Links = list[tuple[Value, Centre]]
"""Operands that have to be centred, and how, for a result to be centred."""


class Blocked(Exception):
    """Nothing ahead of a node can take the mean of its result away; the message says why."""


Channels = Callable[[Node, Value, Centre], Links | None]
"""A front end's table: the operands behind a result, None for an operator that is not in it; raises `Blocked`."""


def back(node: Node, out: Value, want: Centre, channels: Channels, uniform: Callable[[Value], bool]) -> Links:
    """The operands to centre so that `out` of a node comes out centred as wanted.

    `uniform` tells of a constant whether all its elements are one number. Raises `Blocked`.
    """
    if out.dtype is not None and out.dtype not in FLOATS:
        raise Blocked(f"{_label(node)} gives {out.dtype}, which is rounded")
    if want.only is not None and node.kind not in PARTED:
        raise Blocked(f"{_label(node)} gives a part of what is wanted centred, and the rest, at once")
    rule = _RULES.get(node.kind)
    if rule is not None:
        return rule(node, out, want, uniform)
    links = channels(node, out, want)
    if links is None:
        raise Blocked(f"{_label(node)} mixes or bends the channels")
    return links


def centred(found: Recognition, value: Value, want: Centre) -> bool:
    """The algebra knows that the mean of a value is zero already: a norm without weight, or x - mean(x)."""
    if not want.whole(value):
        return False
    for fact in found.facts.get(value.index, {}).values():
        if fact.root.axes != (want.axis,) or fact.kappa or fact.absolute:
            continue
        if has(fact.alpha, "p") or has(fact.beta, "p") or fact.layout != identity_layout(fact.root.value):
            continue
        with suppress(Refused):
            if not add(mul(fact.alpha, {MEAN: 1.0}), fact.beta):
                return True
    return False


# -- rules of the neutral kinds ---------------------------------------------------------------------------------------


def _label(node: Node) -> str:
    return f"{node.op} {node.name}" if node.name and node.op not in node.name else node.name or node.op


def _axis_in(operand: Value, out: Value, axis: int) -> int | None:
    """The axis of a broadcast operand under an axis of the result; None where it has size 1 or is not there."""
    if operand.shape is None or out.shape is None:
        raise Blocked(f"the shape of {operand.name} is not known")
    found = axis - (len(out.shape) - len(operand.shape))
    return None if found < 0 or (operand.shape[found] == 1 and out.shape[axis] != 1) else found


def _sum(node: Node, out: Value, want: Centre, uniform: Callable[[Value], bool]) -> Links:
    links = []
    for v in node.inputs:
        if v.number == 0:
            continue
        axis = None if v.number is not None else _axis_in(v, out, want.axis)
        if axis is None:
            raise Blocked(f"{_label(node)} adds {v.name}, which is the same for all channels")
        links.append((v, want.moved(axis)))
    return links


def _product(node: Node, out: Value, want: Centre, uniform: Callable[[Value], bool]) -> Links:
    carriers: list[tuple[Value, int]] = []
    for v in node.inputs:
        axis = None if v.number is not None else _axis_in(v, out, want.axis)
        if axis is not None:
            carriers.append((v, axis))
    if not carriers:
        raise Blocked(f"{_label(node)} makes the same of all channels")
    if node.kind == "div" and any(v is not node.inputs[0] for v, _ in carriers):
        raise Blocked(f"{_label(node)} divides the channels by different numbers")
    if len(carriers) == 2:
        scales = [c for c in carriers if _per_channel(*c)]
        if len(scales) != 1:
            raise Blocked(f"{_label(node)} multiplies two values channel by channel")
        (factor, _), (v, axis) = scales[0], next(c for c in carriers if c is not scales[0])
        g = constant_behind(factor)
        if g is None or v.shape != out.shape:
            raise Blocked(f"{_label(node)} scales the channels by what is computed, or spreads what it scales")
        if uniform(g):
            return [(v, want.moved(axis))]
        if not replace(want, scales=()).whole(out):
            raise Blocked(f"{_label(node)} scales the channels within a part of the axis")
        return [(v, replace(want.moved(axis), scales=(g, *want.scales)))]
    return [(v, want.moved(axis)) for v, axis in carriers]


def constant_behind(value: Value) -> Value | None:
    """The constant whose elements a value has, in the same order: itself, or what it is a view or wider copy of."""
    while (node := value.producer) is not None:
        source = node.inputs[0] if node.inputs else value
        axes = [d for d in source.shape or () if d != 1]
        moved = node.kind == "transpose" and len(axes) > 1
        wider = node.kind == "cast" and (source.dtype, value.dtype) in WIDER
        if not wider and (node.kind not in ("identity", "reshape", "unsqueeze", "squeeze", "transpose") or moved):
            return None
        value = source
    return value if value.fixed and not value.overridable and value.native is not None else None


def _per_channel(value: Value, axis: int) -> bool:
    return value.fixed and value.shape is not None and all(i == axis or d == 1 for i, d in enumerate(value.shape))


def _same(node: Node, out: Value, want: Centre, uniform: Callable[[Value], bool]) -> Links:
    (v,) = node.inputs
    if v.dtype not in FLOATS:
        raise Blocked(f"{_label(node)} makes floats of {v.dtype}")
    return [(v, want)]


def _view(node: Node, out: Value, want: Centre, uniform: Callable[[Value], bool]) -> Links:
    v = node.inputs[0]
    if v.shape is None or out.shape is None:
        raise Blocked(f"the shape of {v.name} is not known")
    if node.kind == "transpose":
        perm = node.attrs["perm"]
        only = None if want.only is None else (perm[want.only[0]], want.only[1])
        return [(v, replace(want.moved(perm[want.axis]), only=only))]
    if node.kind == "expand":
        axis = _axis_in(v, out, want.axis)
        if axis is None:
            raise Blocked(f"{_label(node)} repeats one number over the channels")
        return [(v, want.moved(axis))]
    found = regrouped(v.shape, out.shape, want)
    if found is None:
        raise Blocked(f"{_label(node)} regroups the channels")
    return [(v, found)]


def _reduced(node: Node, out: Value, want: Centre, uniform: Callable[[Value], bool]) -> Links:
    v, axes, keep = node.inputs[0], node.attrs["axes"], node.attrs["keepdims"]
    kept = [a for a in range(v.rank or 0) if axes is not None and (keep or a not in axes)]
    if not kept or kept[want.axis] in axes:
        raise Blocked(f"{_label(node)} adds the channels up")
    return [(v, want.moved(kept[want.axis]))]


def regrouped(source: Shape, target: Shape, want: Centre) -> Centre | None:
    """A centring of a reshaped value, seen from before the reshape: the same axis, one that was split into it (then a
    block for each part), or one of those merged into it (then the blocks have to repeat)."""
    found = _regrouped(source, target, replace(want, only=None))
    if found is None or want.only is None:
        return found
    (other, indices), n = want.only, target[want.axis]
    parts = target[other]
    for axis, m in enumerate(source):  # the other axis is one before the reshape, too
        if axis != found.axis and m == parts and (
                _equal(source[:axis], target[:other]) or _equal(source[axis + 1 :], target[other + 1 :])):
            return replace(found, only=(axis, indices))
    merged = target[other : want.axis]  # or it was a part of the one that is centred
    if not merged or not all(isinstance(d, int) for d in target[other : want.axis + 1]):
        return None
    assert isinstance(n, int) and isinstance(parts, int)
    inner = prod(d for d in merged[1:] if isinstance(d, int)) * n
    m = source[found.axis]
    if not isinstance(m, int) or m % (inner * parts) or not _equal(source[found.axis + 1 :], target[want.axis + 1 :]):
        return None
    return replace(found, blocks=tuple((s, b) for s, b in found.blocks if s // inner % parts in indices))


def _regrouped(source: Shape, target: Shape, want: Centre) -> Centre | None:
    n = target[want.axis]
    if not isinstance(n, int):
        return None
    for axis, m in enumerate(source):
        if not isinstance(m, int) or not m or not n:
            continue
        if m == n and _equal(source[:axis], target[: want.axis]):
            return want.moved(axis)
        if not _equal(source[axis + 1 :], target[want.axis + 1 :]):
            continue
        if m == n:
            return want.moved(axis)
        if m % n == 0 and not want.scales:
            return replace(want, axis=axis, blocks=tuple((s + k, b) for k in range(0, m, n) for s, b in want.blocks))
        if n % m == 0 and not want.scales:
            parts = [want.within(k, k + m) for k in range(0, n, m)]
            first = parts[0]
            same = all(p is not None and tuple((s - k * m, b) for s, b in p) == first for k, p in enumerate(parts))
            if first and same:
                return replace(want, axis=axis, blocks=first)
    return None


def _equal(a: Shape, b: Shape) -> bool:
    """Whether two runs of axes hold equally many elements, as far as can be told."""
    if None in a or None in b:
        return False
    numbers = [prod(d for d in s if isinstance(d, int)) for s in (a, b)]
    symbols = [sorted(d for d in s if isinstance(d, str)) for s in (a, b)]
    return numbers[0] == numbers[1] and symbols[0] == symbols[1]


PARTED = frozenset("neg cast identity reshape unsqueeze squeeze transpose".split())
"""The kinds through which a part of a value can be asked for."""
_RULES: dict[str, Callable[[Node, Value, Centre, Callable[[Value], bool]], Links]] = {
    "add": _sum, "sub": _sum, "mul": _product, "div": _product,
    "neg": _same, "cast": _same, "identity": _same,
    "reshape": _view, "unsqueeze": _view, "squeeze": _view, "expand": _view, "transpose": _view,
    "mean": _reduced, "sum": _reduced,
}  # fmt: skip


def joined(value: Value, wants: Sequence[Centre]) -> Centre:
    """All that is wanted of a value as one centring; raises `Blocked` where it cannot be one."""
    first = wants[0]
    if any((w.axis, w.scales) != (first.axis, first.scales) for w in wants):
        raise Blocked(f"{value.name} is wanted centred in two ways")
    only = {w.only for w in wants}
    if len(only) > 1 and (len({w.blocks for w in wants}) > 1 or len({part[0] for part in only if part}) > 1):
        raise Blocked(f"{value.name} is wanted centred in two ways")
    blocks = blocks_of(b for w in wants for b in w.blocks)
    if blocks is None:
        raise Blocked(f"{value.name} is wanted centred over blocks that overlap")
    return replace(first, blocks=blocks, only=None if None in only else united(value, [part for part in only if part]))


def united(value: Value, parts: Sequence[tuple[int, tuple[int, ...]]]) -> Part:
    """Some indices of an axis of a value together; None where they are all of it."""
    axis, indices = parts[0][0], sorted({i for _, some in parts for i in some})
    return None if value.shape is not None and value.shape[axis] == len(indices) else (axis, tuple(indices))


def blocks_of(values: Iterator[Block]) -> tuple[Block, ...] | None:
    """Blocks in order, each once; None where two overlap."""
    found = sorted(set(values))
    return tuple(found) if all(a + n <= b for (a, n), (b, _) in pairwise(found)) else None
