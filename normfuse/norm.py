"""What a norm is: the record of one, and how a fact is read as one.

- RMSNorm:   alpha = w * (m2 + eps)**-1/2,          beta = b
- LayerNorm: alpha = w * (m2 - m1**2 + eps)**-1/2,  beta = b - alpha*m1
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from normfuse.facts import (
    M2, MEAN, MEAN_SQ, ONE, SQ_MEAN, Fact, Poly, Refused, has, mul, number, root_poly,
)  # fmt: skip
from normfuse.graph import PRECISION, Node, Value

NEAR = 1e-6
"""How far a coefficient may be from the one that a norm has: the roundings of constants in float32."""
VIEWS = frozenset("reshape unsqueeze squeeze expand transpose".split())

Term = tuple[float, tuple[tuple[Value, int], ...]]
Expr = tuple[Term, ...]
"""A sum of products of parameters: ((coefficient, ((value, exponent), ...)), ...)."""


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """``weight * (x [- mean(x)]) * (mean-square or variance + eps)**-1/2 + bias``, as recognised.

    `weight` is None for 1, `bias` is None for 0. `compute` is the dtype of the statistics; `cast` says where the
    result is rounded back: "none" (it stays in `compute`), "first" (before the weight, to `narrow`), "last" (after it)
    or "mixed" (an order of roundings that no single operator has). `dtype` is the type of the result. `narrow` is the
    type of x but where x is a sum in float32 of narrow tensors (vLLM).
    """

    kind: str
    x: Value
    axes: tuple[int, ...]
    size: int | None
    eps: float
    weight: Expr | None
    bias: Expr | None
    compute: str
    cast: str
    dtype: str
    narrow: str = ""

    def parameters(self) -> list[Value]:
        """The values that the weight and the bias are made of."""
        return [v for expr in (self.weight, self.bias) if expr for _, factors in expr for v, _ in factors]


@dataclass(slots=True, eq=False)
class Site:
    """A norm in the graph: the value that is one, and whether a single operator computes it already."""

    value: Value
    norm: Norm
    fact: Fact
    is_op: bool
    label: str = ""
    mixed: str = ""
    placement: str = "other"
    attends: Node | None = None
    """The attention product that the norm of a query or key goes into."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What nearly was a norm, or was one and could not be fused: a stable code, the node, the reason."""

    code: str
    node: str
    message: str


@dataclass(frozen=True, slots=True)
class Match:
    """A fact read as a norm; weight and bias are polynomials of parameters."""

    kind: str
    eps: float
    weight: Poly
    bias: Poly


def match(fact: Fact) -> Match:
    """Read a fact as a norm, or raise `Refused` with what is missing."""
    roots = {(atom, e) for key in fact.alpha for atom, e in key if atom[0] == "T"}
    if not roots or any(atom == M2 and e < 0 for key in fact.alpha for atom, e in key):
        if len(fact.alpha) > 1:
            raise Refused("NF101", "eps is added outside the root")
        raise Refused("NF103", "eps is missing; a norm needs a positive eps under the root")
    if len(roots) != 1 or any(sum(a[0] == "T" for a, _ in key) != 1 for key in fact.alpha):
        raise Refused("NF101", "x is not scaled by exactly one root of a statistic")
    ((atom, exponent),) = roots
    under = root_poly(atom)
    if exponent != -0.5:
        if any(a[0] == "T" or e % 1 for key in under for a, e in key):
            raise Refused("NF101", "eps is added outside the root: std + eps is not sqrt(var + eps)")
        raise Refused("NF105", f"the statistic is raised to {number(exponent)}, a norm needs -1/2")
    kind, eps = _under(under)
    weight: Poly = {}
    for key, c in fact.alpha.items():
        weight[tuple(f for f in key if f[0] != atom)] = _whole(c)
    if has(weight, "m"):
        raise Refused("NF106", "x is scaled by a mean besides the root")
    bias = fact.beta
    if kind == "layer_norm":
        shift = mul(fact.alpha, {MEAN: 1.0})
        bias = dict(bias)
        for key, c in shift.items():
            if abs(bias.pop(key, 0.0) + c) > NEAR * abs(c):
                raise Refused("NF102", "x is divided by its standard deviation but its mean is not taken away")
    if any(a[0] != "p" for key in bias for a, _ in key):
        raise Refused("NF106", "a statistic is left in the sum")
    return Match(kind, eps, weight, bias)


def _whole(c: float) -> float:
    """c, or the power of two that it is but for the roundings of constants in float32."""
    fraction, exponent = math.frexp(c)
    near = round(2 * fraction) / 2  # of 0.5 to 1
    return math.ldexp(near, exponent) if abs(fraction - near) <= NEAR / 4 else c


def _under(under: Poly) -> tuple[str, float]:
    """Kind and eps of the statistic under the root."""
    rest = dict(under)
    square, centre = rest.pop(SQ_MEAN, 0.0), rest.pop(MEAN_SQ, 0.0)
    eps = rest.pop(ONE, 0.0)
    if rest:
        if has(rest, "p"):
            raise Refused("NF104", "eps is not a constant of the graph")
        if has(rest, "T"):
            raise Refused("NF101", "eps is added outside the root: std + eps is not sqrt(var + eps)")
        raise Refused("NF106", "under the root stands another statistic than a mean square or a variance")
    if abs(square - 1.0) > NEAR or not (centre == 0.0 or abs(centre + 1.0) <= NEAR):
        raise Refused("NF106", "under the root stands neither mean(x^2) nor var(x)")
    if eps <= 0:
        raise Refused("NF103", f"eps is {number(eps)}; a norm needs a positive eps under the root")
    return ("layer_norm" if centre else "rms_norm"), eps


def plain(expr: Expr) -> bool:
    """A single parameter, as it is."""
    return len(expr) == 1 and expr[0][0] == 1.0 and len(expr[0][1]) == 1 and expr[0][1][0][1] == 1


def reads_x(norm: Norm) -> bool:
    """Whether an operator for a norm reads x as it is, and not a cast of it."""
    return norm.x.dtype == (norm.narrow if norm.cast == "first" else norm.compute if norm.cast == "none" else "")


def precision(fact: Fact) -> tuple[str, str, str]:
    """(compute dtype, where it is cast back, to what before the weight), or `Refused` when no operator casts so."""
    compute, back, promoted = "", "", ""
    affine: set[bool] = set()
    current = fact.root.value.dtype or "?"
    for event, dtype in fact.trace:
        if event == "mixed":
            raise Refused("NF117", "the value is summed from branches with different roundings")
        if event == "cast":
            if not compute:
                current = dtype
            elif back:
                if affine or promoted or PRECISION.get(dtype, 0) <= PRECISION.get(back, 99):
                    raise Refused("NF117", "the result is cast twice")
                promoted = dtype  # for a wider weight after the cast back: Llama's in float32 on bfloat16 x
            elif PRECISION.get(dtype, 0) > PRECISION.get(compute, 99):
                raise Refused("NF117", "a wider copy of a norm is not rounded back")
            else:
                back = dtype
            continue
        level = promoted or back or current
        if dtype != level:
            raise Refused("NF117", f"a step in {dtype} amid {level}")
        if event in ("centre", "norm") and back:
            raise Refused("NF117", "normalised after the cast back")
        if event not in ("centre", "norm"):
            affine.add(bool(back))
        compute = compute or dtype
    if sum(e in ("weight", "scale") and PRECISION.get(d, 0) < 24 for e, d in fact.trace) > 1:
        raise Refused("NF117", "scaled twice in a narrow type, with a rounding each time")
    if promoted and True not in affine:
        raise Refused("NF117", "the result is cast twice")
    if len(affine) == 2:
        raise Refused("NF117", "the cast back stands between scale and shift")
    if fact.types != {compute}:
        raise Refused("NF117", f"statistics in {'/'.join(sorted(fact.types))}, normalised in {compute}")
    cast = "none" if not back else "first" if True in affine else "last"
    return compute, cast, back if cast == "first" else ""


def exact(weight: Poly) -> bool:
    """Every factor is a power of two, so that it may move past a rounding, and nothing is divided by a parameter."""
    powers = all(math.frexp(c)[0] in (0.5, -0.5) for c in weight.values())
    return powers and all(e > 0 for key in weight for _, e in key)


LEAST = {"bfloat16": -133, "float16": -24, "float32": -149, "float64": -1074}
"""The exponent of the least number of a type."""


def kept(eps: float, dtype: str) -> bool:
    """Whether a type holds a number as exactly as float32 does, and does not round it, to 0 at last."""
    if dtype not in LEAST or not math.isfinite(eps):
        return dtype not in LEAST
    step = 2.0 ** max(math.frexp(eps)[1] - PRECISION[dtype], LEAST[dtype])
    return abs(round(eps / step) * step - eps) <= NEAR * eps


def region(value: Value, norm: Norm) -> list[Node]:
    """The nodes between the root of a norm and a value, last first."""
    stop = {norm.x, *norm.parameters()}
    todo, seen, out = [value], set(stop), set()
    while todo:
        current = todo.pop()
        node = current.producer
        if current in seen or node is None:
            continue
        seen.add(current)
        if node not in out:
            out.add(node)
            todo.extend(node.inputs)
    return sorted(out, key=lambda node: -node.index)


def end_of(value: Value) -> Value:
    """The value of the graph that a value inside an operator ends in: itself, where it is one."""
    while value.native is None and value.uses:
        value = value.uses[0].outputs[0]
    return value


def is_op(value: Value, norm: Norm) -> bool:
    """One node of the model does it all, copies and views aside."""
    natives = {node.native for node in region(value, norm) if node.kind not in VIEWS and node.kind != "identity"}
    return len(natives) == 1 and None not in natives
