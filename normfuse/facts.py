"""The algebra: what is known of a value, as a formula in one root tensor and its two moments.

Fix a root `x` and the normalised axes R. A fact describes a value as

    v = kappa*x**2 + alpha*x + beta

where kappa, alpha and beta are polynomials over four kinds of atoms:

- `m1 = mean_R(x)` and `m2 = mean_R(x**2)`, the only row statistics there are;
- parameters, constant over rows and varying along R (a weight, a bias);
- roots `T**q`: a polynomial in the moments raised to a rational power, scaled so that the coefficient of m2 is 1.
  This scaling makes `sum/N`, a sum with `eps*N`, and scaled inputs the same fact as the mean.

A polynomial is a dict from monomial to number; a monomial is a sorted tuple of (atom, exponent). Both are small.
Coefficients are floats: a coefficient below 1e-12 of what it was made of is rounding, and dropped.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

from normfuse.graph import Value

Atom = tuple[object, ...]
Monomial = tuple[tuple[Atom, float], ...]
Poly = dict[Monomial, float]

M1: Atom = ("m", 1)
M2: Atom = ("m", 2)
ONE: Monomial = ()
ZERO: Poly = {}
MEAN: Monomial = ((M1, 1.0),)
MEAN_SQ: Monomial = ((M1, 2.0),)
SQ_MEAN: Monomial = ((M2, 1.0),)

MAX_TERMS = 12
MAX_DEPTH = 3


class Refused(Exception):
    """A transfer rule does not hold here; `code` is stable, the message is for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def constant(c: float) -> Poly:
    """The polynomial that is a number."""
    return {ONE: c} if c else {}


def add(p: Poly, q: Poly) -> Poly:
    """p + q, where what cancels to rounding is gone."""
    if not p or not q:
        return p or q
    out = dict(p)
    for key, c in q.items():
        old = out.get(key, 0.0)
        new = _finite(old + c)
        if abs(new) <= 1e-12 * max(abs(old), abs(c)):
            out.pop(key, None)
        else:
            out[key] = new
    if len(out) > MAX_TERMS:
        raise Refused("NF100", "the expression has too many terms to be a norm")
    return out


def scale(p: Poly, c: float) -> Poly:
    """c * p; a product that is 1 but for the rounding of c in float32 (`N * (1/N)`) is 1."""
    return {key: _times(v, c) for key, v in p.items()} if c else {}


def _finite(c: float) -> float:
    if not math.isfinite(c):
        raise Refused("NF100", "a constant factor is beyond all numbers")
    return c


def _times(a: float, c: float) -> float:
    """a * c, exact where c is the float32 reciprocal of the integer a (or the other way round)."""
    product = _finite(a * c)
    for n, r in ((a, c), (c, a)):
        near = abs(abs(product) - 1.0) < 1e-6
        if 1 < abs(n) < 2**53 and n == int(n) and near and single(abs(1.0 / n)) == single(abs(r)):
            return math.copysign(1.0, product)
    return product


def mul(p: Poly, q: Poly) -> Poly:
    """p * q."""
    out: Poly = {}
    for k1, c1 in p.items():
        for k2, c2 in q.items():
            out = add(out, _expand(_merge(k1, k2), _times(c1, c2)))
    return out


def _merge(a: Monomial, b: Monomial) -> Monomial:
    if not a or not b:
        return a or b
    exponents = dict(a)
    for atom, e in b:
        total = exponents.get(atom, 0.0) + e
        if total:
            exponents[atom] = total
        else:
            del exponents[atom]
    return tuple(sorted(exponents.items()))


def _expand(key: Monomial, c: float) -> Poly:
    """Multiply out roots that have come to a positive whole power."""
    for i, (atom, e) in enumerate(key):
        if atom[0] == "T" and e in (1.0, 2.0):
            rest = _expand(key[:i] + key[i + 1 :], c)
            for _ in range(int(e)):
                rest = mul(rest, root_poly(atom))
            return rest
    return {key: c}


def power(p: Poly, q: float) -> Poly:
    """p ** q for a rational q; a fractional power only of what cannot be negative."""
    whole = q == int(q)
    if not p:
        raise Refused("NF105", "a power of zero")
    if len(p) == 1:
        ((key, c),) = p.items()
        if not whole and (c < 0 or not all(_positive(atom) for atom, _ in key)):
            raise Refused("NF105", "a fractional power of what may be negative")
        try:
            raised = c**q
        except ArithmeticError:
            raise Refused("NF105", "a power beyond all numbers") from None
        if any(abs(e * q) > 1e6 for _, e in key):
            raise Refused("NF105", "a power beyond all use")
        return _expand(tuple((atom, e * q) for atom, e in key), raised)
    if 0 < q <= 4 and whole:
        out = p
        for _ in range(int(q) - 1):
            out = mul(out, p)
        return out
    if not free(p):
        raise Refused("NF104", "a root or quotient whose argument varies along the normalised axes")
    lead = p.get(SQ_MEAN) or p[min(p)]
    if lead < 0 and not whole:
        raise Refused("NF103", "the root of a negative statistic")
    depth = 1 + max((int(str(a[1])) for key in p for a, _ in key if a[0] == "T"), default=0)
    if depth > MAX_DEPTH:
        raise Refused("NF100", "roots are nested too deeply to be a norm")
    items = tuple(sorted((key, c / lead) for key, c in p.items()))
    return {((("T", depth, items), q),): lead**q}


def root_poly(atom: Atom) -> Poly:
    """The polynomial under a root atom."""
    return dict(atom[2])  # type: ignore[call-overload, no-any-return]


def _positive(atom: Atom) -> bool:
    return atom == M2 or (atom[0] == "T" and bound(root_poly(atom)) is not None)


def bound(p: Poly) -> float | None:
    """A number that p never falls below, by its form alone (variances and squares are not negative), or None."""
    low = p.get(ONE, 0.0)
    for key, c in p.items():
        if key in (ONE, SQ_MEAN):
            continue
        if key == MEAN_SQ and c < 0:
            if p.get(SQ_MEAN, 0.0) < -c * (1 - 1e-6):
                return None
        elif c < 0 or not all(_positive(atom) or e == 2 for atom, e in key):
            return None
    return None if p.get(SQ_MEAN, 0.0) < 0 else low


def free(p: Poly) -> bool:
    """No parameter in p: it does not vary along the normalised axes."""
    return all(atom[0] != "p" for key in p for atom, _ in key)


def has(p: Poly, tag: str) -> bool:
    """Some monomial of p holds an atom of this kind: "m", "p" or "T"."""
    return any(atom[0] == tag for key in p for atom, _ in key)


def _level(p: Poly) -> int:
    level = 0
    for key in p:
        for atom, e in key:
            if atom[0] == "T":
                inner = _level(root_poly(atom))
                level = max(level, 3 if inner >= 2 or e % 1 else inner)
            elif atom[0] == "m":
                level = max(level, 1 if atom == M1 else 3 if e < 0 or e % 1 else 2)
    return level


RootKey = tuple[int, tuple[int, ...]]
"""The index of a root's value, and its axes."""


@dataclass(frozen=True, slots=True, eq=False)
class Root:
    """A tensor and the axes over which it may be normalised; `size` is the number of elements in a row."""

    value: Value
    axes: tuple[int, ...]
    size: int | None

    def key(self) -> RootKey:
        return (self.value.index, self.axes)


Layout = tuple[tuple[int, ...], ...]
"""For each axis of a value, the axes of the root it runs over; () where its size is 1."""


@dataclass(frozen=True, slots=True, eq=False)
class Fact:
    """What a value is in terms of one root.

    `trace` lists the events with a rounding on the way from the root, as (event, dtype); events are cast, centre,
    norm, scale, weight and bias. `types` are the dtypes in which the statistics were computed. `absolute` marks |v|,
    which only a square can use, and `partial` the axes of the root over which a mean has been taken already while
    others are still to come. `via` is the operand that carries x.
    """

    root: Root
    kappa: Poly
    alpha: Poly
    beta: Poly
    layout: Layout
    trace: tuple[tuple[str, str], ...] = ()
    types: frozenset[str] = frozenset()
    absolute: bool = False
    partial: frozenset[int] = frozenset()
    via: Value | None = None

    @property
    def linear(self) -> bool:
        """Depends on x itself, not only through the moments."""
        return bool(self.alpha or self.kappa)

    @property
    def advanced(self) -> int:
        """How far on the way to a norm: 0 no statistics, 1 a mean, 2 a second moment, 3 a root of one."""
        level = max(_level(p) for p in (self.kappa, self.alpha, self.beta))
        return max(level, 2) if self.kappa else level


def single(c: float) -> float:
    """c rounded to float32; infinite where it overflows."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", c))[0])
    except OverflowError:
        return math.copysign(math.inf, c)


def number(c: float) -> str:
    """The shortest decimal that rounds to c in float32."""
    if abs(c) < 1e6 and c == int(c):
        return str(int(c))
    for digits in range(1, 10):
        text = f"{c:.{digits}g}"
        if single(float(text)) == single(c):
            return text
    return repr(c)


Namer = Callable[[Atom], str]


def _atom(atom: Atom, x: str, name: Namer) -> str:
    if atom == M1:
        return f"mean({x})"
    if atom == M2:
        return f"mean({x}^2)"
    if atom[0] == "T":
        return f"({formula_poly(root_poly(atom), x, name)})"
    return name(atom)


def _exponent(e: float) -> str:
    return f"{int(e)}" if e == int(e) else f"{int(e * 2)}/2" if e * 2 == int(e * 2) else f"{e:g}"


def _monomial(key: Monomial, c: float, x: str, name: Namer, middle: str = "") -> str:
    order = {"p": 0, "m": 2, "T": 3}
    parts = [] if abs(c) == 1 and (key or middle) else [number(abs(c))]
    early = [f for f in key if f[0][0] == "p"]
    late = sorted((f for f in key if f[0][0] != "p"), key=lambda f: order[str(f[0][0])])
    for atom, e in early:
        parts.append(_atom(atom, x, name) + ("" if e == 1 else f"^{_exponent(e)}"))
    if middle:
        parts.append(middle)
    for atom, e in late:
        parts.append(_atom(atom, x, name) + ("" if e == 1 else f"^{_exponent(e)}"))
    return "*".join(parts)


def formula_poly(p: Poly, x: str = "x", name: Namer = lambda atom: str(atom[2])) -> str:
    """p as mathematics; a variance is written as one."""
    terms: list[tuple[float, str]] = []
    rest = dict(p)
    c = rest.get(SQ_MEAN, 0.0)
    if c > 0 and abs(rest.get(MEAN_SQ, 0.0) + c) <= 1e-9 * c:
        del rest[SQ_MEAN], rest[MEAN_SQ]
        terms.append((c, ("" if c == 1 else number(c) + "*") + f"var({x})"))
    for key in sorted(rest, key=lambda k: (k == ONE, k)):
        terms.append((rest[key], _monomial(key, rest[key], x, name)))
    return _join(terms)


def _join(terms: list[tuple[float, str]]) -> str:
    out = ""
    for c, text in terms:
        out += (" - " if c < 0 else " + ") + text if out else ("-" if c < 0 else "") + text
    return out or "0"


def formula(fact: Fact, x: str = "x", name: Namer = lambda atom: str(atom[2])) -> str:
    """The fact as mathematics, such as ``w*x*(mean(x^2) + 1e-06)^-1/2``."""
    terms: list[tuple[float, str]] = []
    rest = fact.beta
    for key in sorted(fact.kappa):
        terms.append((fact.kappa[key], _monomial(key, fact.kappa[key], x, name, f"{x}^2")))
    for key in sorted(fact.alpha):
        c = fact.alpha[key]
        shifted = _merge(key, MEAN)
        if shifted in rest and abs(rest[shifted] + c) <= 1e-6 * abs(c):
            rest = {k: v for k, v in rest.items() if k != shifted}
            terms.append((c, _monomial(key, c, x, name, f"({x} - mean({x}))")))
        else:
            terms.append((c, _monomial(key, c, x, name, x)))
    if rest:
        text = formula_poly(rest, x, name)
        terms.append((-1.0, text[1:]) if text.startswith("-") else (1.0, text))
    return f"|{_join(terms)}|" if fact.absolute else _join(terms)
