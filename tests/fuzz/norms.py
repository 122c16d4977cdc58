"""True norms in random spellings: each choice below is one that the algebra has to see through.

The truth that goes with a spelling follows from the choices alone: a statistic that is `factor` times the mean square
with `added` on top is a norm with eps = added / factor; where x was scaled by s first, eps / s**2 of x itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.fuzz.program import WIDTH, Builder, Shape, Truth, Val

SCALES = (2.0, 0.5, -1.0, 3.0, 0.25, -2.0)


@dataclass(slots=True)
class Parts:
    """The inner values of a norm, for those who share or read them: what is divided, the statistic, its root.

    `narrow` is the type that it may be cast back to before the weight.
    """

    narrow: str
    core: Val
    statistic: Val
    factor: float
    truth: Truth
    wide: str
    inner: list[Val]


class Norm:
    """Writes a norm of x over some axes; the methods are the parts that near misses put together otherwise."""

    def __init__(self, b: Builder, x: Val, axes: tuple[int, ...]) -> None:
        self.b, self.x, self.axes = b, x, axes
        self.size = math.prod(x.shape[a] for a in axes)
        self.last = axes == (len(x.shape) - 1,)
        self.kept = tuple(1 if i in axes else d for i, d in enumerate(x.shape))

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(a - len(self.x.shape) for a in self.axes)

    # -- statistics -------------------------------------------------------------------------------------------------

    def restored(self, v: Val) -> Val:
        """A statistic without its axes, with them again."""
        return self.b.unsqueeze(v, self.axes) if self.b.chance(0.6) else self.b.reshape(v, self.kept)

    def over(self, total: Val, n: float | None = None) -> Val:
        """A sum as a mean."""
        b, n = self.b, n or self.size
        if b.chance(0.5):
            return b.op("div", total, b.number(n, total.dtype, exact=True))
        inverse = b.number(1.0 / n, total.dtype)
        b.loose = b.loose or math.frexp(n)[0] != 0.5
        if total.dtype == "float16" and math.frexp(n)[0] != 0.5:  # 1/N is another number in float16
            return b.op("div", total, b.number(n, total.dtype, exact=True))
        return b.op("mul", total, inverse)

    def mean(self, v: Val) -> Val:
        b = self.b
        way = b.pick("keep", "keep", "keep", "drop", "sum", "sum", "steps", "matrix")
        if way == "drop":
            return self.restored(b.reduce("mean", v, self.axes, keep=False))
        if way == "sum":
            return self.over(b.reduce("sum", v, self.axes))
        if way == "steps" and len(self.axes) > 1:
            first = b.reduce("mean", v, self.axes[1:])
            return b.reduce("mean", first, self.axes[:1])
        if way == "matrix" and self.last and len(v.shape) > 1 and math.frexp(self.size)[0] == 0.5:
            return b.matmul(v, b.const(np.full((self.size, 1), 1.0 / self.size), v.dtype))
        return b.reduce("mean", v, self.axes)

    def square(self, v: Val) -> Val:
        b = self.b
        way = b.pick("mul", "mul", "pow", "square", "abs", "neg")
        if way == "abs":
            v = b.op("abs", v)
        if way == "neg":
            return b.op("mul", b.op("neg", v), b.op("neg", v))
        if way in ("mul", "abs"):
            return b.op("mul", v, v)
        return b.op("square", v) if way == "square" else b.op("pow", v, b.number(2.0, v.dtype))

    def total(self, v: Val) -> Val:
        """The sum of squares."""
        b = self.b
        way = b.pick("sum", "sumsq", "norm", "dot", "matrix")
        if way == "sumsq":
            return b.reduce("sumsq", v, self.axes)
        if way == "norm":
            return self.square(b.reduce("vecnorm", v, self.axes))
        if way == "dot" and self.last and len(v.shape) > 1:
            return b.unsqueeze(b.op("rowdot", v, v, shape=v.shape[:-1]), (len(v.shape) - 1,))
        if way == "matrix" and self.last and len(v.shape) > 1:
            rank = len(v.shape)
            return b.squeeze(b.matmul(b.unsqueeze(v, (rank - 1,)), b.unsqueeze(v, (rank,))), (rank,))
        return b.reduce("sum", self.square(v), self.axes)

    def mean_square(self, v: Val) -> Val:
        return self.mean(self.square(v)) if self.b.chance(0.6) else self.over(self.total(v))

    def second(self, v: Val) -> tuple[Val, float]:
        """The mean square and how many times it is there."""
        if self.b.chance(0.15):
            return self.total(v), float(self.size)
        return self.mean_square(v), 1.0

    def variance(self, v: Val, mean: Val, centred: Val) -> tuple[Val, float]:
        """The variance and how many times it is there."""
        b, n = self.b, self.size
        way = b.pick("two", "two", "two", "one", "one", "op", "unbiased", "again")
        if way == "one":
            found = b.op("sub", self.mean_square(v), self.square(mean))
            return (b.op("max", found, b.number(0.0, v.dtype)) if b.chance(0.3) else found), 1.0
        if way == "op":
            correction = b.pick(0, 0, 1)
            return b.reduce("var", v, self.axes, correction=correction), n / (n - correction)
        if way == "unbiased":
            written = float(np.dtype(v.dtype).type(n - 1))  # above 2048, float16 has even numbers only
            return b.op("div", self.total(centred), b.number(written, v.dtype)), n / written
        if way == "again":
            centred = b.op("sub", v, self.mean(v))
        return self.second(centred)

    def centred(self, v: Val, mean: Val) -> tuple[Val, float]:
        """v - mean, or its negative and -1."""
        b = self.b
        way = b.pick("sub", "sub", "sub", "add", "turned", "back")
        if way == "add":
            return b.op("add", v, b.op("neg", mean)), 1.0
        if way == "turned":
            return b.op("sub", mean, v), -1.0
        if way == "back":
            return b.op("neg", b.op("sub", mean, v)), 1.0
        return b.op("sub", v, mean), 1.0

    # -- eps and root -----------------------------------------------------------------------------------------------

    def eps(self, dtype: str) -> float:
        low, high = (-2.5, -0.7) if dtype == "float16" else (-5.5, -0.7)
        return float(10 ** (low + (high - low) * self.b.rng.random()))

    def plus(self, v: Val, c: float) -> tuple[Val, float]:
        """v + c in one of the ways to write it, and what was added in fact."""
        b = self.b
        way = b.pick("add", "add", "add", "swapped", "sub", "halves")
        e = b.number(-c if way == "sub" else c, v.dtype)
        assert e.data is not None
        held = float(e.data.reshape(-1)[0])
        if way == "sub":
            return b.op("sub", v, e), -held
        if way == "halves":
            return b.op("add", b.op("add", v, e), e), 2 * held
        return b.op("add", *((e, v) if way == "swapped" else (v, e))), held

    def root(self, e: Val) -> tuple[Val, bool]:
        """The root of a statistic, or its inverse and True."""
        b = self.b
        way = b.pick("div", "div", "rsqrt", "rsqrt", "reciprocal", "one", "pow", "half", "inner", "quarter")
        if way == "rsqrt":
            return b.op("rsqrt", e), True
        if way == "reciprocal":
            return b.op("reciprocal", b.op("sqrt", e)), True
        if way == "one":
            return b.op("div", b.number(1.0, e.dtype), b.op("sqrt", e)), True
        if way == "pow":
            return b.op("pow", e, b.number(-0.5, e.dtype)), True
        if way == "half":
            return b.op("pow", e, b.number(0.5, e.dtype)), False
        if way == "inner":
            return b.op("sqrt", b.op("reciprocal", e)), True
        if way == "quarter":
            quarter = b.op("sqrt", b.op("sqrt", e))
            return b.op("mul", quarter, quarter), False
        return b.op("sqrt", e), False

    def scaled(self, core: Val, root: Val, inverse: bool) -> Val:
        b = self.b
        if root.dtype != core.dtype:
            root = b.cast(root, core.dtype)
        if b.chance(0.1):
            root = b.expand(root, core.shape)
        if not inverse:
            return b.op("div", core, root)
        return b.op("mul", *((core, root) if b.chance(0.7) else (root, core)))

    # -- weight and bias ----------------------------------------------------------------------------------------------

    def param(self, dtype: str) -> Val:
        """A weight or a bias along the normalised axes."""
        b = self.b
        shape = [d if i in self.axes else 1 for i, d in enumerate(self.x.shape)]
        while shape and shape[0] == 1 and b.chance(0.8):
            shape.pop(0)
        if self.last and len(shape) == 1 and b.chance(0.15):
            return b.input(tuple(shape), dtype)
        sign = b.pick(1.0, 1.0, 1.0, -1.0)
        return b.const(np.array([sign * (0.4 + b.rng.random()) for _ in range(math.prod(shape))]).reshape(shape), dtype)

    def weighted(self, n: Val) -> Val:
        b, w = self.b, self.param(n.dtype)
        way = b.pick("mul", "mul", "mul", "swapped", "one", "sum", "div", "gain", "two", "neg")
        if way == "swapped":
            return b.op("mul", w, n)
        if way == "one":
            return b.op("mul", n, b.op("add", w, b.number(1.0, n.dtype)))
        if way == "sum":
            return b.op("add", *((n, b.op("mul", n, w)) if b.chance(0.5) else (b.op("mul", n, w), n)))
        if way == "div":
            return b.op("div", n, w)
        if way == "gain":
            return b.op("mul", b.op("mul", n, b.number(b.pick(*SCALES), n.dtype)), w)
        if way == "two":
            return b.op("mul", b.op("mul", n, w), self.param(n.dtype))
        if way == "neg":
            return b.op("neg", b.op("mul", n, w))
        return b.op("mul", n, w)

    def biased(self, n: Val) -> Val:
        b, bias = self.b, self.param(n.dtype)
        way = b.pick("add", "add", "swapped", "sub")
        if way == "swapped":
            return b.op("add", bias, n)
        return b.op(way, n, bias)

    def affine(self, n: Val) -> Val:
        if self.b.chance(0.75):
            n = self.weighted(n)
        return self.biased(n) if self.b.chance(0.4) else n


def wider(b: Builder, dtype: str) -> str:
    """A type that is wider than this one, or the type itself."""
    return str(b.pick(*[d for d in WIDTH if WIDTH[d] >= WIDTH[dtype]]))


def write(b: Builder, x: Val, axes: tuple[int, ...], kind: str, narrow: str) -> tuple[Val, Parts]:
    """A norm of x in the type of x, or in a wider one; the caller casts the result to what it needs."""
    order = b.pick("own", "own", "own", "wide", "wide", "statistics")
    wide = x.dtype if order == "own" else wider(b, x.dtype)
    h, scale = x, 1.0
    if order == "wide":
        h = b.cast(h, wide)
    if order != "own" and b.chance(0.1) and wide != x.dtype:
        h = b.cast(b.cast(b.cast(x, wide), x.dtype), h.dtype)
    if b.chance(0.15):
        scale = float(b.pick(*SCALES))
        h = b.op("mul", h, b.number(scale, h.dtype))
    if b.chance(0.08):
        h, scale = b.op("neg", h), -scale
    writer = Norm(b, h, axes)
    seen = b.cast(h, wide)
    if kind == "layer_norm":
        mean = writer.mean(seen)
        core, _ = writer.centred(h, b.cast(mean, h.dtype))
        centred = b.cast(core, wide)
        statistic, factor = writer.variance(seen, mean, centred)
        inner = [mean, core]
    else:
        core, inner = h, []
        statistic, factor = writer.second(seen)
    if b.chance(0.08):
        times = float(b.pick(2.0, 4.0, 0.5))
        statistic, factor = b.op("mul", statistic, b.number(times, wide)), factor * times
    truth = Truth(kind, (writer.ends,), (), order + " " + wide, size=writer.size)
    parts = Parts(narrow, core, statistic, factor, truth, wide, [*inner, statistic])
    truth.how += f" scale {scale:g}" if scale != 1 else ""
    result = finish(b, writer, parts, scale)
    if kind == "layer_norm" and b.chance(0.05):
        result = b.op("neg", result)
    return result, parts


def finish(b: Builder, writer: Norm, parts: Parts, scale: float) -> Val:
    """From a statistic to the norm: eps, root, quotient, weight and bias in some order, a cast somewhere."""
    e, added = writer.plus(parts.statistic, writer.eps(parts.wide) * parts.factor)
    true = added / parts.factor
    parts.truth.eps += (true, true / scale**2)
    root, inverse = writer.root(e)
    core = parts.core
    order = b.pick("plain", "plain", "plain", "before", "folded")
    if order == "before":
        core = b.op("mul", core, writer.param(core.dtype))
    elif order == "folded" and inverse:
        root = b.op("mul", root, writer.param(root.dtype))
    n = writer.scaled(core, root, inverse)
    parts.inner += [e, root, n]
    if b.chance(0.3):
        n = b.cast(n, parts.narrow)
    return writer.affine(n) if order == "plain" else writer.biased(n) if b.chance(0.3) else n


def operator(b: Builder, x: Val) -> tuple[Val, Truth]:
    """A norm that is one operator."""
    rank = len(x.shape)
    count = b.pick(1, 1, 1, min(2, rank))
    kind = b.pick("layer_norm", "rms_norm")
    writer = Norm(b, x, tuple(range(rank - count, rank)))
    eps = float(np.float32(writer.eps("float32")))
    shape = x.shape[rank - count :]
    params = [b.const(0.4 + np.array([b.rng.random() for _ in range(writer.size)]).reshape(shape), x.dtype)
              for _ in range(b.pick(1, 2) if kind == "layer_norm" else 1)]  # fmt: skip
    out = b.op(kind, x, *params, shape=x.shape, count=count, eps=eps)
    return out, Truth(kind, (writer.ends,), (eps,), "operator", size=writer.size)


View = tuple[Val, tuple[int, ...], Callable[[Val], Val], tuple[tuple[int, ...], ...]]


def view(b: Builder, x: Val, axes: tuple[int, ...]) -> View:
    """x seen otherwise: the value, the axes there, the way back, and the axes as one may name them from the end."""
    rank, ends = len(x.shape), tuple(a - len(x.shape) for a in axes)
    way = b.pick("none", "none", "none", "turned", "rows", "joined", "longer", "groups")
    if way == "turned":
        rest = [i for i in range(rank) if i not in axes]
        perm = (*rest, *axes)
        there = b.transpose(x, perm)
        moved = tuple(range(len(rest), rank))
        undo = tuple(perm.index(i) for i in range(rank))
        return there, moved, lambda v: b.transpose(v, undo), (ends, tuple(a - rank for a in moved))
    if way == "rows" and rank > 2 and axes == (rank - 1,):
        there = b.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))
        return there, (1,), lambda v: b.reshape(v, x.shape), (ends,)
    if way == "joined" and axes == tuple(range(rank - len(axes), rank)) and 1 < len(axes) < rank:
        shape: Shape = (*x.shape[: -len(axes)], math.prod(x.shape[rank - len(axes) :]))
        return b.reshape(x, shape), (len(shape) - 1,), lambda v: b.reshape(v, x.shape), (ends, (-1,))
    if way == "longer" and axes == (rank - 1,):
        there = b.unsqueeze(x, (rank - 1,))
        return there, (rank,), lambda v: b.squeeze(v, (rank - 1,)), (ends,)
    if way == "groups" and axes == (rank - 1,) and x.shape[-1] % 2 == 0 and x.shape[-1] > 4:
        there = b.reshape(x, (*x.shape[:-1], 2, x.shape[-1] // 2))
        return there, (rank,), lambda v: b.reshape(v, x.shape), ((-1,),)
    return x, axes, lambda v: v, (ends,)
