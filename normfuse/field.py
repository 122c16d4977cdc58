"""A second proof that a region is the norm it is taken for: both computed exactly, in integers modulo a prime.

A norm is polynomial in its input and parameters but for one root. Modulo P = 3 (mod 4) the squares are a group of odd
order, in which every element has exactly one root, u**((P + 1) / 4); roots of products are products of roots, as for
positive numbers. P is moreover -1 modulo each prime up to 23, by which these, and so most sizes of axes, are squares.
Two formulas that differ agree at a random point with probability at most degree/P (Schwartz and Zippel), and here they
have to agree in every element of several rows. Floats are only looked at: whether a constant is a fraction.

The region's neutral nodes are computed, not the facts of the recogniser, so that a wrong rule shows. What has no sense
modulo a prime (abs, max, a constant such as 19.595919) is not proved, and rests on the comparison in floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import numpy as np

from normfuse.graph import Dim, Node, Value
from normfuse.norm import Expr, Site, region
from normfuse.ort_values import Array
from normfuse.plan import Edit, Replace
from normfuse.verify import Check

P = 4 * 446185740 - 1
"""Elements are int64 from 0 to P - 1, so that products fit."""
LARGE = 2**20
TRIES = 64


class Unsuited(Exception):
    """The region has no meaning modulo a prime, or one that cannot be known."""


class NoSquare(Exception):
    """This point has no root here: take another one."""


class Prover:
    """Proves the norms of edits; a region that was met before, in another layer, is not computed again."""

    def __init__(self) -> None:
        self.done: dict[str, bool | None] = {}

    def judge(self, edit: Edit, check: Check) -> Check:
        """What is known of an edit that passed in floats: a norm that is disproved fails it."""
        if not check.ok or (isinstance(edit, Replace) and edit.as_written):
            return check
        found = [self.prove(site) for site in edit.sites]
        if False in found:
            return Check(False, message="is another function: exactly computed, modulo a prime, the two differ")
        return replace(check, proved=all(found))

    def prove(self, site: Site) -> bool | None:
        """Whether a region is the norm: True with certainty, False if it is not, None where this way cannot tell."""
        key = _text(site)
        if key not in self.done:
            try:
                self.done[key] = _Proof(site).run()
            except (Unsuited, ValueError):  # or sizes that were cut down and do not fit any more
                self.done[key] = None
        return self.done[key]


def _text(site: Site) -> str:
    """All of a region that matters to a proof, the names of values left out."""
    ids: dict[Value, int] = {}
    norm = site.norm

    def name(v: Value) -> object:
        return ids.setdefault(v, len(ids)), v.shape, v.number

    def expr(e: Expr | None) -> object:
        return e and [(c, [(name(v), k) for v, k in factors]) for c, factors in e]

    first = (norm.kind, norm.axes, norm.eps, name(norm.x), expr(norm.weight), expr(norm.bias))
    nodes = region(site.value, norm)[::-1]
    return repr((first, [(n.kind, n.attrs, [*map(name, n.inputs)], [*map(name, n.outputs)]) for n in nodes]))


def fraction(c: float, size: int = 1) -> Fraction:
    """The number that a constant in float32 stands for, if that is beyond doubt: an integer, a dyadic number of few
    digits, 1/n, a decimal of few digits, or such a one divided by `size`; else `Unsuited`."""
    if not math.isfinite(c):
        raise Unsuited
    near = float(np.float32(c))
    mantissa, _ = math.frexp(near)
    if near == round(near) or mantissa * 2**8 == round(mantissa * 2**8):
        return Fraction(near)
    inverse = round(1 / near)
    if 0 < abs(inverse) < 2**20 and np.float32(1 / inverse) == np.float32(near):
        return Fraction(1, inverse)
    decimal = Decimal(str(np.float32(near)))
    if len(decimal.normalize().as_tuple().digits) <= 3:
        return Fraction(decimal)
    if size > 1:
        return fraction(near * size) / size
    raise Unsuited


def element(number: Fraction) -> int:
    """A fraction modulo P."""
    if number.denominator % P == 0:
        raise Unsuited
    return number.numerator % P * pow(number.denominator, -1, P) % P


def power(a: Array, n: int) -> Array:
    """a**n, element by element."""
    out = np.ones_like(a)
    while n:
        if n & 1:
            out = out * a % P
        a = a * a % P
        n >>= 1
    return out


def inverse(a: Array) -> Array:
    """1/a; `NoSquare` where an element is zero, which another point will not be."""
    if not a.all():
        raise NoSquare
    return power(a, P - 2)


def root(a: Array) -> Array:
    """The root that is a square itself."""
    out = power(a, (P + 1) // 4)
    if (out * out % P != a).any():
        raise NoSquare
    return out


class _Proof:
    def __init__(self, site: Site) -> None:
        self.site, self.norm = site, site.norm
        self.nodes = region(site.value, site.norm)[::-1]
        x = self.norm.x
        if x.shape is None or self.norm.size is None or self.norm.size > LARGE:
            raise Unsuited
        if not all(isinstance(x.shape[a], int) for a in self.norm.axes):
            raise Unsuited
        for v in self.norm.parameters():  # in the layout of x, or the formula would spread it over the rows
            sizes = enumerate(v.shape or (), len(x.shape) - len(v.shape or ()))
            if any(d != 1 and axis not in self.norm.axes for axis, d in sizes):
                raise Unsuited
        shaped = any(node.kind in ("reshape", "expand") for node in self.nodes)
        self.sizes: dict[Dim, int] = {x.shape[a]: int(x.shape[a] or 0) for a in self.norm.axes}
        for i, d in enumerate(x.shape):
            if i not in self.norm.axes and d not in self.sizes:
                self.sizes[d] = d if isinstance(d, int) and (d < 2 or (shaped and d < 4)) else 2
        # as many rows as a row is long, by chance: only a reshape needs to be told the two apart by their sizes
        self.shape = tuple(self.sizes[d] if shaped or i in self.norm.axes else min(self.sizes[d], 2)
                           for i, d in enumerate(x.shape))  # fmt: skip
        if math.prod(self.shape) > 4 * LARGE:
            raise Unsuited

    def run(self) -> bool:
        rng = np.random.default_rng(0)
        for _ in range(TRIES):
            try:
                values = {self.norm.x: self._rows(rng)}
                for v in self.norm.parameters():
                    values[v] = rng.integers(1, P, tuple(self._size(d) for d in v.shape or ()))
                for node in self.nodes:
                    if node.outputs[0].number is not None:  # however it comes to be
                        continue
                    values[node.outputs[0]] = self._compute(node, [self._value(v, values) for v in node.inputs])
                want, got = self._formula(values), values[self.site.value]
                return want.size == got.size and bool((want.reshape(got.shape) == got).all())
            except NoSquare:
                continue
        raise Unsuited

    def _size(self, d: Dim) -> int:
        if d in self.sizes:
            return self.sizes[d]
        if not isinstance(d, int):
            raise Unsuited
        return d

    def _rows(self, rng: np.random.Generator) -> Array:
        """Random rows under whose root stands a square."""
        x = rng.integers(0, P, self.shape)
        for _ in range(TRIES):
            u = self._under(x)
            bad = power(u, (P - 1) // 2) != 1
            if not bad.any():
                return x
            x = np.where(bad, rng.integers(0, P, self.shape), x)
        raise NoSquare

    def _under(self, x: Array) -> Array:
        """mean(x^2) [- mean(x)^2] + eps."""
        axes = self.norm.axes
        under = _mean(x * x % P, axes, True)
        if self.norm.kind == "layer_norm":
            m = _mean(x, axes, True)
            under = under - m * m % P
        return (under + element(fraction(self.norm.eps, self.norm.size or 1))) % P

    def _formula(self, values: dict[Value, Array]) -> Array:
        """The norm by its definition."""
        x = values[self.norm.x]
        n = (x - _mean(x, self.norm.axes, True)) % P if self.norm.kind == "layer_norm" else x
        n = n * inverse(root(self._under(x))) % P
        if self.norm.weight is not None:
            n = n * self._expr(self.norm.weight, values) % P
        return n if self.norm.bias is None else (n + self._expr(self.norm.bias, values)) % P

    def _expr(self, expr: Expr, values: dict[Value, Array]) -> Array:
        total = np.zeros((), np.int64)
        for c, factors in expr:
            term = np.array(element(fraction(c, self.norm.size or 1)))
            for v, exponent in factors:
                base = values[v] if exponent > 0 else inverse(values[v])
                term = term * power(base, abs(exponent)) % P
            total = (total + term) % P
        return total

    def _value(self, v: Value, values: dict[Value, Array]) -> Array:
        if v in values:
            return values[v]
        if v.number is None or v.overridable:
            raise Unsuited
        c = element(fraction(v.number, self.norm.size or 1))
        return np.full(tuple(self._size(d) for d in v.shape or ()), c)

    def _compute(self, node: Node, args: list[Array]) -> Array:
        if node.kind in ("reshape", "expand"):
            return self._shaped(node, args[0])
        if node.kind == "pow":
            exponent = node.inputs[1].number
            if exponent is None:
                raise Unsuited
            return _to_the(args[0], exponent)
        rule = RULES.get(node.kind)
        if rule is None:
            raise Unsuited
        return rule(node, args)

    def _shaped(self, node: Node, x: Array) -> Array:
        shape = node.outputs[0].shape
        if shape is None:
            raise Unsuited
        sizes = [1 if d == 1 else self.sizes.get(d, -1) for d in shape]
        if sizes.count(-1) > 1 or (node.kind == "expand" and -1 in sizes):
            raise Unsuited
        try:
            out = x.reshape(sizes) if node.kind == "reshape" else np.broadcast_to(x, sizes)
        except ValueError:
            raise Unsuited from None
        self.sizes |= {d: n for d, n in zip(shape, out.shape, strict=True) if isinstance(d, str)}
        return out


def _to_the(a: Array, exponent: float) -> Array:
    quarters = round(exponent * 4)
    if quarters != exponent * 4 or abs(exponent) > 16:
        raise Unsuited
    base, times = a if quarters > 0 else inverse(a), abs(quarters)
    for _ in range(2):
        if times % 2:
            base = root(base)
        else:
            times //= 2
    return power(base, times)


def _mean(x: Array, axes: tuple[int, ...], keepdims: bool) -> Array:
    size = math.prod(x.shape[a] for a in axes)
    return np.asarray(_sum(x, axes, keepdims) * pow(size, -1, P) % P)


def _sum(x: Array, axes: tuple[int, ...], keepdims: bool) -> Array:
    return np.asarray(x.sum(axis=tuple(axes), keepdims=keepdims)) % P


def _reduced(take: Callable[[Array, tuple[int, ...], bool], Array]) -> Callable[[Node, list[Array]], Array]:
    def rule(node: Node, args: list[Array]) -> Array:
        axes = node.attrs["axes"]
        if axes is None:
            raise Unsuited
        return take(args[0], tuple(axes), bool(node.attrs.get("keepdims", True)))

    return rule


def _var(node: Node, args: list[Array]) -> Array:
    axes, keepdims, x = tuple(node.attrs["axes"] or ()), bool(node.attrs.get("keepdims", True)), args[0]
    correction, size = node.attrs.get("correction", 0), math.prod(x.shape[a] for a in axes)
    if correction != int(correction) or size <= correction:
        raise Unsuited
    centred = (x - _mean(x, axes, True)) % P
    return np.asarray(_sum(centred * centred % P, axes, keepdims) * pow(size - int(correction), -1, P) % P)


def _matmul(node: Node, args: list[Array]) -> Array:
    a, b = args
    if b.ndim == 1:
        return _matmul(node, [a, b[:, None]])[..., 0]
    if a.ndim < 2 or a.size * b.shape[-1] > 4 * LARGE:
        raise Unsuited
    return np.asarray((a[..., :, :, None] * b[..., None, :, :] % P).sum(axis=-2)) % P


def _axes(node: Node, args: list[Array]) -> Array:
    change = np.expand_dims if node.kind == "unsqueeze" else np.squeeze
    return np.asarray(change(args[0], tuple(node.attrs["axes"])))


def _norm(node: Node, args: list[Array]) -> Array:
    x, axes = args[0], tuple(node.attrs["axes"])
    if node.kind == "layer_norm":
        x = (x - _mean(x, axes, True)) % P
    under = (_mean(x * x % P, axes, True) + element(fraction(float(node.attrs["eps"])))) % P
    return np.asarray(x * inverse(root(under)) % P)


RULES: dict[str, Callable[[Node, list[Array]], Array]] = {
    "add": lambda node, args: (args[0] + args[1]) % P,
    "sub": lambda node, args: (args[0] - args[1]) % P,
    "mul": lambda node, args: args[0] * args[1] % P,
    "div": lambda node, args: args[0] * inverse(args[1]) % P,
    "neg": lambda node, args: -args[0] % P,
    "square": lambda node, args: args[0] * args[0] % P,
    "sqrt": lambda node, args: root(args[0]),
    "rsqrt": lambda node, args: inverse(root(args[0])),
    "reciprocal": lambda node, args: inverse(args[0]),
    "cast": lambda node, args: args[0],
    "identity": lambda node, args: args[0],
    "mean": _reduced(_mean),
    "sum": _reduced(_sum),
    "var": _var,
    "std": lambda node, args: root(_var(node, args)),
    "vecnorm": lambda node, args: root(_reduced(_sum)(node, [args[0] * args[0] % P])),
    "matmul": _matmul,
    "unsqueeze": _axes,
    "squeeze": _axes,
    "transpose": lambda node, args: np.transpose(args[0], node.attrs["perm"]),
    "layer_norm": _norm,
    "rms_norm": _norm,
}
"""Kind of node -> what it computes."""
