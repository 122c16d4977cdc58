"""Near misses: what looks like a norm and is none, or is one with a trap. Each says which norms are in it all the same.

A miss is a function of (builder, norm writer over x, another tensor z of the same shape) that gives its result and
the norms that are truly in it. `FRAGILE` ones can divide by zero or take the root of a negative number: their results
are not computed with any further, and they read inputs, so that roundings elsewhere do not decide what comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from tests.fuzz.norms import Norm
from tests.fuzz.program import Builder, Truth, Val

Miss = Callable[[Builder, Norm, Val], tuple[Val, list[Truth]]]
MISSES: dict[str, Miss] = {}
FRAGILE: set[str] = set()
UNCENTRED = ("not_centred_above", "other_axes")
SQUARE: list[str] = []
"""Misses that need x to have two last axes of one size, and the last one normalised."""


def _miss(fragile: bool = False, square: bool = False) -> Callable[[Miss], Miss]:
    def enter(fn: Miss) -> Miss:
        name = fn.__name__.removeprefix("_")
        MISSES[name] = fn
        FRAGILE.update({name} if fragile else ())
        SQUARE.extend([name] if square else [])
        return fn

    return enter


def _large(b: Builder) -> float:
    """An eps that no rounding hides."""
    return 0.02 + 0.3 * b.rng.random()


def _num(b: Builder, c: float, like: Val) -> Val:
    return b.number(c, like.dtype)


def _centre(b: Builder, w: Norm) -> tuple[Val, Val, Val]:
    """mean, x - mean, variance."""
    mean = w.mean(w.x)
    c = b.op("sub", w.x, mean)
    return mean, c, w.mean_square(c)


def _statistic(b: Builder, w: Norm) -> tuple[Val, Val, str]:
    """What is divided, its second moment, and the kind of norm that this would make."""
    if b.chance(0.5):
        _, c, v = _centre(b, w)
        return c, v, "layer_norm"
    return w.x, w.mean_square(w.x), "rms_norm"


def _end(w: Norm, core: Val, e: Val) -> Val:
    """The quotient by the root of e."""
    root, inverse = w.root(e)
    return w.affine(w.scaled(core, root, inverse))


def _true(b: Builder, w: Norm, core: Val, v: Val, kind: str, factor: float = 1.0,
          affine: bool = True) -> tuple[Val, Truth]:  # fmt: skip
    """A norm after all."""
    e, added = w.plus(v, w.eps(v.dtype))
    root, inverse = w.root(e)
    n = w.scaled(core, root, inverse)
    return (w.affine(n) if affine else n), Truth(kind, (w.ends,), (added / factor,), "in a near miss", size=w.size)


# -- eps ------------------------------------------------------------------------------------------------------------


@_miss()
def _eps_outside(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    core, v, _ = _statistic(b, w)
    root = b.op("add", b.op("sqrt", v), _num(b, _large(b), v))
    return w.affine(b.op("div", core, root)), []


@_miss()
def _eps_outside_unbiased(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    c = b.op("sub", w.x, w.mean(w.x))
    v = b.op("div", w.total(c), _num(b, max(w.size - 1, 1), c))
    return w.affine(b.op("div", c, b.op("add", b.op("sqrt", v), _num(b, _large(b), v)))), []


@_miss()
def _eps_inside_and_outside(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    core, v, _ = _statistic(b, w)
    e, _ = w.plus(v, w.eps(v.dtype))
    return w.affine(b.op("div", core, b.op("add", b.op("sqrt", e), _num(b, _large(b), v)))), []


@_miss()
def _eps_on_the_reciprocal(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    core, v, _ = _statistic(b, w)
    e, _ = w.plus(v, w.eps(v.dtype))
    return w.affine(b.op("mul", core, b.op("add", b.op("rsqrt", e), _num(b, _large(b), v)))), []


@_miss(fragile=True)
def _eps_missing(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    core, v, _ = _statistic(b, w)
    return _end(w, core, v), []


@_miss(fragile=True)
def _eps_negative(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    core, v, _ = _statistic(b, w)
    return _end(w, core, b.op("sub", v, _num(b, _large(b), v))), []


@_miss(fragile=True)
def _eps_zero(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    core, v, _ = _statistic(b, w)
    return _end(w, core, b.op("add", v, _num(b, 0.0, v))), []


@_miss()
def _eps_vector(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    core, v, _ = _statistic(b, w)
    shape = tuple(d if i in w.axes else 1 for i, d in enumerate(w.x.shape))
    return _end(w, core, b.op("add", v, b.const(np.linspace(0.01, 0.5, w.size).reshape(shape), v.dtype))), []


@_miss()
def _eps_per_row(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    core, v, _ = _statistic(b, w)
    if np.prod(w.kept) == 1:
        return _eps_vector(b, w, z)
    eps = np.linspace(0.01, 0.5, int(np.prod(w.kept))).reshape(w.kept)
    return _end(w, core, b.op("add", v, b.const(eps, v.dtype))), []


@_miss()
def _eps_input(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    core, v, _ = _statistic(b, w)
    return _end(w, core, b.op("add", v, b.op("square", b.input(b.pick((), (1,)), v.dtype)))), []


@_miss()
def _eps_from_data(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    core, v, _ = _statistic(b, w)
    return _end(w, core, b.op("add", b.op("add", v, b.reduce("amax", b.op("abs", w.x), w.axes)), _num(b, 0.1, v))), []


# -- powers ---------------------------------------------------------------------------------------------------------


@_miss()
def _no_root(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    core, v, _ = _statistic(b, w)
    return w.affine(b.op("div", core, w.plus(v, _large(b))[0])), []


@_miss()
def _other_root(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    core, v, _ = _statistic(b, w)
    e = w.plus(v, w.eps(v.dtype))[0]
    return w.affine(b.op("mul", core, b.op("pow", e, _num(b, b.pick(-0.25, -0.75, -1.0, 0.5, -2.0), v)))), []


@_miss()
def _fourth_power(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    core = w.x if b.chance(0.5) else b.op("sub", w.x, w.mean(w.x))
    q = b.op("pow", core, _num(b, 4.0, core)) if b.chance(0.5) else b.op("square", b.op("square", core))
    return _end(w, core, w.plus(w.mean(q), w.eps(core.dtype))[0]), []


@_miss()
def _absolute_mean(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    core = w.x if b.chance(0.5) else b.op("sub", w.x, w.mean(w.x))
    return _end(w, core, w.plus(w.mean(b.op("abs", core)), w.eps(core.dtype))[0]), []


@_miss()
def _largest(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    e = w.plus(b.reduce("amax", b.op("square", w.x), w.axes), w.eps(w.x.dtype))[0]
    return _end(w, w.x, e), []


@_miss(fragile=True)
def _turned_quotient(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    core, v, _ = _statistic(b, w)
    return w.affine(b.op("div", b.op("sqrt", w.plus(v, w.eps(v.dtype))[0]), core)), []


@_miss()
def _times_deviation(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    core, v, _ = _statistic(b, w)
    return w.affine(b.op("mul", core, b.op("sqrt", w.plus(v, w.eps(v.dtype))[0]))), []


@_miss()
def _two_roots(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    core, v, _ = _statistic(b, w)
    first, second = (b.op("rsqrt", w.plus(v, e)[0]) for e in (_large(b), 2 * _large(b) + 0.4))
    return w.affine(b.op("mul", core, b.op("mul", first, second))), []


@_miss()
def _normed_twice(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    core, v, kind = _statistic(b, w)
    n, truth = _true(b, w, core, v, kind, affine=False)
    return b.op("mul", n, b.op("rsqrt", w.plus(v, truth.eps[0] + 0.5)[0])), [truth]


# -- the mean -------------------------------------------------------------------------------------------------------


@_miss()
def _not_centred_above(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    _, _, v = _centre(b, w)
    return _end(w, w.x, w.plus(v, w.eps(v.dtype))[0]), []


@_miss()
def _not_centred_below(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    c = b.op("sub", w.x, w.mean(w.x))
    return _end(w, c, w.plus(w.mean_square(w.x), w.eps(c.dtype))[0]), []


@_miss()
def _moments_added(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    mean = w.mean(w.x)
    v = b.op("add", w.mean_square(w.x), w.square(mean))
    return _end(w, b.op("sub", w.x, mean), w.plus(v, w.eps(v.dtype))[0]), []


@_miss(fragile=True)
def _mean_not_squared(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    mean = w.mean(w.x)
    v = b.op("sub", w.mean_square(w.x), mean)
    return _end(w, b.op("sub", w.x, mean), w.plus(v, w.eps(v.dtype))[0]), []


@_miss()
def _part_of_the_mean(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    mean, _, v = _centre(b, w)
    d = b.op("sub", w.x, b.op("mul", mean, _num(b, b.pick(0.5, 2.0, -1.0), mean)))
    return _end(w, d, w.plus(v, w.eps(v.dtype))[0]), []


@_miss(fragile=True)
def _divisor_of_the_mean(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    mean = b.op("div", b.reduce("sum", w.x, w.axes), _num(b, w.size + 1, w.x))
    v = b.op("sub", w.mean_square(w.x), w.square(mean))
    return _end(w, b.op("sub", w.x, mean), w.plus(v, w.eps(v.dtype))[0]), []


@_miss()
def _mean_of_another(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    c = b.op("sub", w.x, w.mean(z))
    out, truth = _true(b, w, c, w.mean_square(c), "rms_norm")
    return out, [truth]  # an RMSNorm of x - mean(z)


@_miss()
def _divisor_of_the_variance(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    n = w.size + b.pick(-1, 1, 3) if w.size > 2 else w.size + 1
    core, kind = (w.x, "rms_norm") if b.chance(0.5) else (b.op("sub", w.x, w.mean(w.x)), "layer_norm")
    v = b.op("div", w.total(core), _num(b, n, core))
    out, truth = _true(b, w, core, v, kind, factor=w.size / n)
    return out, [truth]  # with another weight and eps


# -- what the statistic is of -----------------------------------------------------------------------------------------


@_miss()
def _variance_of_another(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    if b.chance(0.5):
        return _end(w, w.x, w.plus(w.mean_square(z), w.eps(z.dtype))[0]), []
    d = b.op("sub", z, w.mean(z))
    return _end(w, b.op("sub", w.x, w.mean(w.x)), w.plus(w.mean_square(d), w.eps(z.dtype))[0]), []


@_miss()
def _product_of_two(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    q = b.op("abs", b.op("mul", w.x, z))
    return _end(w, w.x, w.plus(w.mean(q), w.eps(q.dtype))[0]), []


@_miss()
def _before_the_residual(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    e = w.plus(w.mean_square(w.x), w.eps(z.dtype))[0]
    return _end(w, b.op("add", w.x, z), e), []


@_miss()
def _activation_between(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    e = w.plus(w.mean_square(w.x), w.eps(z.dtype))[0]
    return _end(w, b.op(b.pick("relu", "tanh", "sigmoid"), w.x), e), []


@_miss()
def _half_a_row(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    h = b.op("half", w.x, shape=(*w.x.shape[:-1], max(w.x.shape[-1] // 2, 1)))
    if len(w.x.shape) - 1 not in w.axes or w.x.shape[-1] < 2:
        return _variance_of_another(b, w, z)
    e = w.plus(b.reduce("mean", b.op("square", h), w.axes), w.eps(z.dtype))[0]
    return _end(w, w.x, e), []


@_miss()
def _masked(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    shape = tuple(d if i in w.axes else 1 for i, d in enumerate(w.x.shape))
    mask = b.const((np.arange(w.size) % 3 != 0).astype(float).reshape(shape), w.x.dtype)
    e = w.plus(w.mean(b.op("mul", b.op("square", w.x), mask)), w.eps(z.dtype))[0]
    return _end(w, w.x, e), []


@_miss()
def _truncated(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    e = w.plus(w.mean_square(b.op("trunc", w.x)), _large(b))[0]
    return _end(w, w.x, e), []


@_miss()
def _bias_before_the_root(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    e = w.plus(w.mean_square(w.x), w.eps(z.dtype))[0]
    return _end(w, b.op("add", w.x, w.param(z.dtype)), e), []


@_miss()
def _weighted_mean(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    k = b.op("mul", w.x, w.param(z.dtype))
    e, added = w.plus(w.mean_square(k), w.eps(z.dtype))
    truth = Truth("rms_norm", (w.ends,), (added,), "of w*x with weight 1/w", least=0)
    return b.op("mul", w.x, b.op("rsqrt", e)), [truth]


@_miss()
def _absolute_above(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    a = b.op("abs", w.x)
    own = b.chance(0.5)
    out, truth = _true(b, w, a, w.mean(b.op("mul", a, a) if own else b.op("mul", w.x, w.x)), "rms_norm")
    return out, [truth if own else replace(truth, least=0)]  # an RMSNorm of |x|


@_miss()
def _other_axes(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    rank = len(w.x.shape)
    others = [a for a in range(rank) if a not in w.axes and w.x.shape[a] > 1]
    if not others:
        return _not_centred_above(b, w, z)
    other = Norm(b, w.x, tuple(sorted({b.pick(*others), *(w.axes if b.chance(0.5) else ())})))
    c = b.op("sub", w.x, other.mean(w.x))
    if b.chance(0.5):
        out, truth = _true(b, w, c, w.mean_square(c), "rms_norm")
        return out, [truth]  # an RMSNorm of the centred value
    d = b.op("sub", w.x, w.mean(w.x))
    return _end(w, c, w.plus(w.mean_square(d), w.eps(z.dtype))[0]), []


# -- clamps ---------------------------------------------------------------------------------------------------------


@_miss()
def _clamp_for_eps(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    core, v, _ = _statistic(b, w)
    return _end(w, core, b.op("max", v, _num(b, _large(b), v))), []


@_miss()
def _clamp_and_eps(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    core, v, _ = _statistic(b, w)
    v = b.op("max", v, _num(b, 0.5, v)) if b.chance(0.6) else b.op("min", v, _num(b, 0.5, v))
    return _end(w, core, w.plus(v, w.eps(v.dtype))[0]), []


@_miss()
def _clamped_norm(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    length = b.reduce("vecnorm", w.x, w.axes)
    return w.affine(b.op("div", w.x, b.op("max", length, _num(b, _large(b), length)))), []


# -- broadcasting -----------------------------------------------------------------------------------------------------


@_miss(square=True)
def _keepdims_gone(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    core = w.x if b.chance(0.5) else b.op("sub", w.x, b.reduce("mean", w.x, w.axes))
    v = b.reduce("mean", w.square(core), w.axes, keep=False)
    if len(core.shape) > 2:
        v = b.unsqueeze(v, (len(core.shape) - 2,))
    return _end(w, core, w.plus(v, w.eps(v.dtype))[0]), []


@_miss(square=True)
def _statistics_turned(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    rank = len(w.x.shape)
    v = b.reduce("mean", w.square(w.x), (rank - 2,))
    v = b.transpose(v, (*range(rank - 2), rank - 1, rank - 2)) if b.chance(0.5) else b.reshape(v, w.kept)
    return _end(w, w.x, w.plus(v, w.eps(v.dtype))[0]), []


@_miss(square=True)
def _divided_turned(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    rank = len(w.x.shape)
    turned = b.transpose(w.x, (*range(rank - 2), rank - 1, rank - 2))
    return _end(w, turned, w.plus(w.mean_square(w.x), w.eps(z.dtype))[0]), []


@_miss()
def _weight_per_row(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    core, v, kind = _statistic(b, w)
    n, truth = _true(b, w, core, v, kind, affine=False)
    rows = b.const(np.linspace(0.5, 1.5, int(np.prod(w.kept))).reshape(w.kept), n.dtype)
    return b.op(b.pick("mul", "add"), n, rows), [truth]


@_miss(fragile=True)
def _weight_wider(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    core, v, kind = _statistic(b, w)
    n, truth = _true(b, w, core, v, kind, affine=False)
    shape = (2, *(1 for _ in w.x.shape[:-1]), w.x.shape[-1])
    wide = b.const(np.linspace(0.5, 1.5, 2 * w.x.shape[-1]).reshape(shape), n.dtype)
    return b.op(b.pick("mul", "add"), n, wide), [truth]


@_miss()
def _weight_from_data(b: Builder, w: Norm, z: Val) -> tuple[Val, list[Truth]]:
    core, v, kind = _statistic(b, w)
    n, truth = _true(b, w, core, v, kind, affine=False)
    gate = b.op(b.pick("sigmoid", "tanh"), w.x) if b.chance(0.5) else b.pick(w.x, z)
    return b.op("mul", n, gate), [truth]
