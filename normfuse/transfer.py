"""What each kind of node does to facts: a dict from kind to a small rule, one law each.

A rule takes the node and the facts of its operands in one root and returns the fact of the output, or raises
`Refused` where the law does not hold. Refusing is the default: a kind without a rule ends every fact.
Adding an operator is one row here and one in a front end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from normfuse.facts import (
    MEAN, ONE, SQ_MEAN, ZERO, Fact, Layout, Poly, Refused, Root, add, bound, constant, free, has, mul, number,
    power, scale,
)  # fmt: skip
from normfuse.graph import FLOATS, PRECISION, Dim, Node, Shape, Value

Rule = Callable[[Node, list[Fact]], Fact]

SPREAD = (-1,)
"""Layout entry of an axis longer than 1 along which the value is constant (after an expand)."""


def identity_layout(value: Value) -> Layout:
    """Every axis runs over itself; axes of size 1 over nothing."""
    assert value.shape is not None
    return tuple(() if d == 1 else (i,) for i, d in enumerate(value.shape))


def start(root: Root) -> Fact:
    """The fact of the root itself: x."""
    return Fact(root, ZERO, {ONE: 1.0}, ZERO, identity_layout(root.value))


def spans(entry: tuple[int, ...], d: Dim, root: Root) -> bool:
    """Whether these axes of the root together have size d."""
    shape = root.value.shape
    assert shape is not None
    dims = [shape[a] for a in entry if a >= 0]
    size = 1
    for dim in dims:
        if not isinstance(dim, int):
            return len(dims) == 1 and dim is not None and dim == d
        size *= dim
    return size == d


def align(value: Value, layout: Layout, root: Root, beside: Shape | None = None) -> Layout:
    """The layout of a row-constant operand beside a value of the given layout, and shape."""
    if value.shape is None:
        raise Refused("NF115", f"the shape of {value.name} is not known")
    out: list[tuple[int, ...]] = []
    for i, d in enumerate(value.shape):
        j = len(layout) - len(value.shape) + i
        entry = layout[j] if j >= 0 else ()
        if not entry and j >= 0 and d != 1:  # a parameter that scales a statistic before it meets x
            taken = {a for e in (*layout, *out) for a in e}
            axes = [(a,) for a in root.axes if a not in taken]
            axes.sort(key=lambda e: e != (j,) or len(layout) != root.value.rank)
            entry = next((e for e in (*axes, root.axes) if spans(e, d, root)), ())  # a wrong guess does not fit x
        if d == 1:
            out.append(())
        elif entry == SPREAD or (value.number is not None and entry and spans(entry, d, root)):
            out.append(entry)
        elif value.number is not None and entry and beside is not None and j >= 0 and d is not None and beside[j] == d:
            out.append(entry)  # as long as what it meets, whatever that is
        elif not entry or (not layout[j] and not spans(entry, d, root)):
            raise Refused("NF108", f"{value.name} is wider than the tensor it scales or shifts")
        elif not set(entry) <= set(root.axes):
            raise Refused("NF109", f"{value.name} is not constant over the rows that are normalised")
        elif not spans(entry, d, root):
            raise Refused("NF108", f"{value.name} is not known to match the normalised size")
        else:
            out.append(entry)
    return tuple(out)


def broadcast(a: Layout, b: Layout) -> Layout:
    """The layout of an elementwise result, if the axes of both sides mean the same."""
    n = max(len(a), len(b))
    out = []
    for p, q in zip(((),) * (n - len(a)) + a, ((),) * (n - len(b)) + b, strict=True):
        if p and q and p != q and SPREAD not in (p, q):
            raise Refused("NF107", "two operands line up different axes; a kept axis of size 1 is missing")
        out.append(q if not p or (p == SPREAD and q) else p)
    return tuple(out)


SCALED = "float16 of x scaled down"
"""A type that no operator computes in: there the square of x itself, from 256 on, would be infinite."""


def _dtype(node: Node) -> str:
    return node.outputs[0].dtype or "?"


def _combine(node: Node, f: Fact, g: Fact, kappa: Poly, alpha: Poly, beta: Poly, events: Sequence[str]) -> Fact:
    """The fact of an elementwise result, with its cast trace."""
    main, via = (f, node.inputs[0]) if f.linear else (g, node.inputs[-1])
    trace = main.trace
    if f.linear and g.linear and f.trace != g.trace:
        long, short = (f, g) if len(f.trace) >= len(g.trace) else (g, f)
        if long.trace[: len(short.trace)] != short.trace:
            events = (*events, "mixed")
        trace, via = long.trace, node.inputs[0] if long is f else node.inputs[-1]
    dtype = _dtype(node)
    types = f.types | g.types
    if main.linear and via.dtype != dtype and via.dtype in PRECISION and dtype in PRECISION:
        trace += (("cast", dtype),)  # an operator that promotes its operands casts them first
    if alpha and not kappa:
        trace += tuple((event, dtype) for event in events)
    else:
        types |= {dtype} | {d for event, d in f.trace + g.trace if event != "cast"}
        trace = ()
    return Fact(main.root, kappa, alpha, beta, broadcast(f.layout, g.layout), trace, types, via=via)


def _plain(*facts: Fact) -> None:
    if any(f.absolute for f in facts):
        raise Refused("NF112", "|x| is not linear; only its square is a statistic")
    if any(f.partial for f in facts):
        raise Refused("NF106", "a mean over some of the axes is used before the mean over the others")


def _add(node: Node, facts: list[Fact], sign: float = 1.0) -> Fact:  # sums of facts in one root
    f, g = facts
    _plain(f, g)
    other = f.beta if g.linear and not f.linear else g.beta
    events = [e for e, on in (("centre", has(other, "m")), ("bias", has(other, "p") or ONE in other)) if on]
    if sign < 0:
        g = replace(g, kappa=scale(g.kappa, -1), alpha=scale(g.alpha, -1), beta=scale(g.beta, -1))
    if f.linear and g.linear:
        events = ["weight"] if has(f.alpha, "p") or has(g.alpha, "p") else ["scale"]
        if f.trace == g.trace and (f.alpha, f.beta) == (g.alpha, g.beta):
            events = []  # twice the same: a power of two rounds nothing
    return _combine(node, f, g, add(f.kappa, g.kappa), add(f.alpha, g.alpha), add(f.beta, g.beta), events)


def _mul(node: Node, facts: list[Fact]) -> Fact:  # (a1 x + b1)(a2 x + b2) = a1 a2 x^2 + (a1 b2 + a2 b1) x + b1 b2
    f, g = facts
    same = (f.layout, f.trace) == (g.layout, g.trace)
    if f.absolute and g.absolute and same and (f.alpha, f.beta) == (g.alpha, g.beta):
        return _square(node, [replace(f, absolute=False)])
    _plain(f, g)
    if (f.kappa and g.linear) or (g.kappa and f.linear):
        raise Refused("NF112", "a power of x above the second")
    other = f if g.linear else g
    events = [e for e, on in (("norm", has(other.beta, "m") or has(other.beta, "T")),
                              ("weight", has(other.beta, "p"))) if on]  # fmt: skip
    if not events and not (set(other.beta) == {ONE} and math.frexp(other.beta[ONE])[0] in (0.5, -0.5)):
        events = ["scale"]  # a power of two rounds nothing
    kappa = add(mul(f.alpha, g.alpha), add(mul(f.kappa, g.beta), mul(f.beta, g.kappa)))
    alpha = add(mul(f.alpha, g.beta), mul(f.beta, g.alpha))
    if "norm" in events and all(abs(abs(c) - 1.0) <= 1e-6 for c in alpha.values()):
        f, g = _unscaled(f, _dtype(node)), _unscaled(g, _dtype(node))
    made = _combine(node, f, g, kappa, alpha, mul(f.beta, g.beta), events)
    if f.linear and g.linear and _dtype(node) == "float16" and abs(kappa.get(ONE, 1.0)) < 1.0 - 1e-6:
        made = replace(made, types=made.types | {SCALED})
    return made


def _unscaled(f: Fact, dtype: str) -> Fact:
    """A constant that x was multiplied by leaves no more than a rounding where the statistic has it, too."""
    if PRECISION.get(dtype, 0) < 24:
        return f
    return replace(f, trace=tuple(event for event in f.trace if event != ("scale", dtype)))


def _inverse(f: Fact) -> Fact:
    if f.linear:
        raise Refused("NF105", "division by a value that depends on x itself, not on its statistics")
    return replace(f, beta=power(f.beta, -1.0))


def _div(node: Node, facts: list[Fact]) -> Fact:
    return _mul(node, [facts[0], _inverse(facts[1])])


def _unary(node: Node, f: Fact, kappa: Poly, alpha: Poly, beta: Poly) -> Fact:
    types = f.types if alpha and not kappa else f.types | {_dtype(node)} | {d for e, d in f.trace if e != "cast"}
    trace = f.trace if alpha and not kappa else ()
    return Fact(f.root, kappa, alpha, beta, f.layout, trace, types, via=node.inputs[0])


def _neg(node: Node, facts: list[Fact]) -> Fact:
    f = facts[0]
    _plain(f)
    return _unary(node, f, scale(f.kappa, -1), scale(f.alpha, -1), scale(f.beta, -1))


def _abs(node: Node, facts: list[Fact]) -> Fact:  # |v|, to be squared
    f = facts[0]
    if f.partial:
        _plain(f)
    if not f.linear and bound(f.beta) is not None:
        return _same(node, facts)
    if f.kappa:
        raise Refused("NF112", "the absolute value of a square")
    return replace(f, absolute=True, via=node.inputs[0])


def _square(node: Node, facts: list[Fact]) -> Fact:
    f = replace(facts[0], absolute=False)
    return _mul(node, [f, f])


def _power(node: Node, f: Fact, q: float) -> Fact:
    if f.linear or f.absolute:
        if q == 2.0:
            return _square(node, [f])
        if q == 1.0:
            return _same(node, [f])
        raise Refused("NF112", f"x to the power {number(q)}; a norm has x and its square only")
    return _unary(node, f, ZERO, ZERO, power(f.beta, q))


def _pow(node: Node, facts: list[Fact]) -> Fact:
    q = node.inputs[1].number
    if q is None or not abs(q) <= 1e6 or abs(q * 4 - round(q * 4)) > 1e-12:
        raise Refused("NF105", "the exponent is not a constant multiple of 1/4")
    return _power(node, replace(facts[0], layout=broadcast(facts[0].layout, facts[1].layout)), q)


def _max(node: Node, facts: list[Fact]) -> Fact:  # max(v, c) = v where v >= c by its form
    f, g = facts
    c = node.inputs[1].number
    if c is None:
        f, g, c = g, f, node.inputs[0].number
    low = None if f.linear else bound(f.beta)
    if c is None or low is None or c > low:
        raise Refused("NF119", "a clamp that changes small values")
    return replace(_same(node, [f]), layout=broadcast(f.layout, g.layout), types=f.types | {_dtype(node)})


def _cast(node: Node, facts: list[Fact]) -> Fact:  # identity for the mathematics, an event for the rounding
    f = facts[0]
    old, new = node.inputs[0].dtype, node.outputs[0].dtype
    if old == new:
        return _same(node, facts)
    if old not in FLOATS or new not in FLOATS:
        raise Refused("NF113", f"a cast from {old} to {new} is no identity")
    if not f.linear:
        return replace(f, types=f.types | {new}, via=node.inputs[0])
    before = f.trace[-2][1] if len(f.trace) > 1 else f.root.value.dtype
    if f.trace and f.trace[-1] == ("cast", old) and before == new and PRECISION[old] > PRECISION[new]:
        return replace(f, trace=f.trace[:-1], via=node.inputs[0])  # there and back again: nothing was rounded
    widens = new in ("float32", "float64") and PRECISION[new] >= PRECISION[old]
    if f.kappa and not widens:
        raise Refused("NF117", "squares rounded to a narrower type")
    if not widens and f.advanced < 3:
        raise Refused("NF117", "x is rounded to a narrower type before it is normalised")
    types = f.types | {new} if f.kappa else f.types
    return replace(f, trace=(*f.trace, ("cast", new)) if not f.kappa else (), types=types, via=node.inputs[0])


def _same(node: Node, facts: list[Fact]) -> Fact:
    return replace(facts[0], via=node.inputs[0])


def _mean(node: Node, facts: list[Fact], total: bool = False) -> Fact:  # mean(k x^2 + a x + b) = k m2 + a m1 + b
    f = facts[0]
    axes, keepdims = node.attrs["axes"], node.attrs.get("keepdims", True)
    if axes is None:
        raise Refused("NF114", "the axes are known only at run time")
    fact = _reduced(f, tuple(f.layout[a] for a in axes), total)
    layout = tuple(() if i in axes else e for i, e in enumerate(f.layout) if i not in axes or keepdims)
    types = f.types | {_dtype(node)} | {d for e, d in f.trace if e != "cast"}
    return replace(fact, layout=layout, types=types, trace=(), via=node.inputs[0])


def _reduced(f: Fact, hit: Layout, total: bool) -> Fact:
    """The mean (or sum) of f over axes of its value, given by what they run over."""
    if total and SPREAD in hit:
        raise Refused("NF107", "a sum over an expanded axis")
    over = sorted(a for entry in hit if entry != SPREAD for a in entry)
    if not over and not f.linear:
        return f
    if not over:
        raise Refused("NF121", "a mean over an axis of size 1")
    done = f.partial | set(over)
    if not done <= set(f.root.axes):
        raise Refused("NF106", "the statistics run over other axes than the ones normalised")
    _plain(replace(f, partial=frozenset()))
    if not (free(f.kappa) and free(f.alpha) and free(f.beta)):
        raise Refused("NF106", "the mean of a tensor already scaled or shifted by a parameter")
    if total:
        size = 1
        for a in over:
            d = f.root.value.shape[a] if f.root.value.shape is not None else None
            if not isinstance(d, int):
                raise Refused("NF115", "a sum over an axis whose size is not known")
            size *= d
        f = replace(f, kappa=scale(f.kappa, size), alpha=scale(f.alpha, size), beta=scale(f.beta, size))
    if done != set(f.root.axes):
        return replace(f, partial=frozenset(done))
    poly = add(mul(f.kappa, {SQ_MEAN: 1.0}), add(mul(f.alpha, {MEAN: 1.0}), f.beta))
    return replace(f, kappa=ZERO, alpha=ZERO, beta=poly, partial=frozenset())


def _whole(fact: Fact) -> Fact:
    """A statistic that one node takes at once."""
    _plain(fact)
    return fact


def _var(node: Node, facts: list[Fact], root_of: bool = False) -> Fact:  # mean(v^2) - mean(v)^2, times N/(N-correction)
    f = facts[0]
    mean = _whole(_mean(node, [f]))
    if f.kappa:
        raise Refused("NF112", "the variance of a square")
    square = _whole(_mean(node, [_square(node, [f])]))
    correction = float(node.attrs.get("correction", 0))
    poly = add(square.beta, scale(mul(mean.beta, mean.beta), -1))
    if correction:
        n = f.root.size
        if n is None or n <= correction:
            raise Refused("NF110", "an unbiased variance over an axis whose size is not known")
        poly = {key: c * n / (n - correction) for key, c in poly.items()}
    return replace(square, beta=power(poly, 0.5) if root_of else poly)


def _vecnorm(node: Node, facts: list[Fact]) -> Fact:  # sqrt(sum(v^2))
    squares = _whole(_mean(node, [_square(node, facts)], total=True))
    return replace(squares, beta=power(squares.beta, 0.5))


def _matmul(node: Node, facts: list[Fact]) -> Fact:  # sum_k a[.., i, k] b[.., k, j] over the normalised axes
    a, b = facts
    la, lb = a.layout, b.layout
    one = len(lb) == 1
    if len(la) < 2 or not lb:
        raise Refused("NF106", "a product of vectors")
    rows, inner = la[-2], la[-1]
    other, column = (lb[0], ()) if one else (lb[-2], lb[-1])
    if inner != other and SPREAD not in (inner, other):
        raise Refused("NF106", "a matrix product over other axes than the ones normalised")
    related = [bool(f.linear or f.advanced) for f in facts]
    if (all(related) and column) or (related[1] and rows):
        raise Refused("NF106", "a matrix product that mixes rows")
    if SPREAD in la[:-2] + lb[:-2]:
        raise Refused("NF106", "a matrix product with unknown operands")
    product = _mul(node, [replace(a, layout=(inner,)), replace(b, layout=(other,))])
    poly = _whole(_reduced(product, product.layout, total=True)).beta
    layout = broadcast(la[:-2], lb[:-2]) + (rows,) + (() if one else (column,))
    return replace(product, kappa=ZERO, alpha=ZERO, beta=poly, layout=layout, trace=(),
                   types=product.types | {_dtype(node)})  # fmt: skip


def regroup(layout: Layout, shape: tuple[Dim, ...], root: Root) -> Layout:
    """The layout after a reshape: axes of the root are dealt out to the new axes, whole and in order."""
    if SPREAD in layout:
        raise Refused("NF107", "a reshape of an expanded value")
    left = [a for entry in layout for a in entry]
    front: list[tuple[int, ...]] = []
    dims = list(shape)
    while dims and (dims[0] == 1 or (left and spans(tuple(left[:1]), dims[0], root))):
        front.append(() if dims[0] == 1 else (left.pop(0),))
        dims.pop(0)
    back: list[tuple[int, ...]] = []
    while dims and (dims[-1] == 1 or (left and spans(tuple(left[-1:]), dims[-1], root))):
        back.append(() if dims[-1] == 1 else (left.pop(),))
        dims.pop()
    middle: list[tuple[int, ...]] = []
    while len(dims) > 1:
        take = 0 if dims[0] == 1 else 1
        while take <= len(left) and not spans(tuple(left[:take]), dims[0], root):
            take += 1
        if take > len(left):
            raise Refused("NF106", "a reshape that splits or joins rows")
        middle.append(tuple(left[:take]))
        del left[:take], dims[0]
    if dims:  # one axis left takes the rest, since a reshape keeps the number of elements
        middle.append(tuple(left))
        left = []
    if left:
        raise Refused("NF106", "a reshape that splits or joins rows")
    return tuple(front + middle + back[::-1])


def _reshape(node: Node, facts: list[Fact]) -> Fact:
    f = facts[0]
    shape, old = node.outputs[0].shape, node.inputs[0].shape
    if shape is None or old is None:
        raise Refused("NF115", "a reshape to a shape that is not known")
    tail = 0  # axes at the end along which the value is constant, and which stay as they are
    while tail < min(len(shape), len(old)) and f.layout[-1 - tail] == SPREAD and shape[-1 - tail] == old[-1 - tail]:
        tail += 1
    layout = regroup(f.layout[: len(old) - tail], shape[: len(shape) - tail], f.root)
    return replace(f, layout=layout + (SPREAD,) * tail, via=node.inputs[0])


def _unsqueeze(node: Node, facts: list[Fact]) -> Fact:
    f = facts[0]
    entries = list(f.layout)
    for a in sorted(a % (len(entries) + len(node.attrs["axes"])) for a in node.attrs["axes"]):
        entries.insert(a, ())
    return replace(f, layout=tuple(entries), via=node.inputs[0])


def _squeeze(node: Node, facts: list[Fact]) -> Fact:
    f = facts[0]
    gone = {a % len(f.layout) for a in node.attrs["axes"]}
    if any(f.layout[a] for a in gone):
        raise Refused("NF107", "a squeeze of an axis not known to have size 1")
    return replace(f, layout=tuple(e for i, e in enumerate(f.layout) if i not in gone), via=node.inputs[0])


def _expand(node: Node, facts: list[Fact]) -> Fact:
    f = facts[0]
    shape, old = node.outputs[0].shape, node.inputs[0].shape
    if shape is None or old is None:
        raise Refused("NF115", "an expand to a shape that is not known")
    pad = len(shape) - len(f.layout)
    entries = []
    for i, d in enumerate(shape):
        entry = f.layout[i - pad] if i >= pad else ()
        if not entry and d != 1:
            if f.linear:
                raise Refused("NF108", "x itself is expanded")
            entry = SPREAD
        elif entry and (d is None or d != old[i - pad]):
            raise Refused("NF108", "an expand along an axis whose size may be another")
        entries.append(entry)
    return replace(f, layout=tuple(entries), via=node.inputs[0])


def _transpose(node: Node, facts: list[Fact]) -> Fact:
    f = facts[0]
    return replace(f, layout=tuple(f.layout[a] for a in node.attrs["perm"]), via=node.inputs[0])


def _norm(node: Node, facts: list[Fact]) -> Fact:  # a node that already is a norm: (v - mean v)(var v + eps)^-1/2
    f = facts[0]
    _plain(f)
    statistic = _whole(_mean(node, [_square(node, facts)])).beta
    beta = f.beta
    if node.kind == "layer_norm":
        mean = _whole(_mean(node, facts)).beta
        statistic = add(statistic, scale(mul(mean, mean), -1))
        beta = add(beta, scale(mean, -1))
    rsqrt = power(add(statistic, constant(float(node.attrs["eps"]))), -0.5)
    return Fact(f.root, ZERO, mul(f.alpha, rsqrt), mul(beta, rsqrt), f.layout, (*f.trace, ("norm", _dtype(node))),
                f.types | {_dtype(node)}, via=node.inputs[0])  # fmt: skip


RULES: dict[str, Rule] = {
    "add": _add,
    "sub": lambda node, facts: _add(node, facts, -1.0),
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "abs": _abs,
    "square": _square,
    "pow": _pow,
    "sqrt": lambda node, facts: _power(node, facts[0], 0.5),
    "rsqrt": lambda node, facts: _power(node, facts[0], -0.5),
    "reciprocal": lambda node, facts: _power(node, facts[0], -1.0),
    "max": _max,
    "cast": _cast,
    "identity": _same,
    "mean": _mean,
    "sum": lambda node, facts: _mean(node, facts, total=True),
    "var": _var,
    "std": lambda node, facts: _var(node, facts, root_of=True),
    "vecnorm": _vecnorm,
    "matmul": _matmul,
    "reshape": _reshape,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "transpose": _transpose,
    "layer_norm": _norm,
    "rms_norm": _norm,
}
"""Kind of node -> what it does to facts."""

REDUCTIONS = frozenset({"mean", "sum", "var", "std", "vecnorm", "matmul", "layer_norm", "rms_norm"})
"""Kinds that take a statistic; where they read is where norms can start."""
