"""Facts and rules in short, for the tests of the algebra."""

from __future__ import annotations

from typing import Any

import pytest

from normfuse.facts import M2, MEAN_SQ, ONE, SQ_MEAN, ZERO, Atom, Fact, Poly, Refused, Root, power
from normfuse.graph import Node, Value
from normfuse.transfer import RULES

W: Atom = ("p", 7, "w")
B: Atom = ("p", 8, "b")
PW, PB = ((W, 1.0),), ((B, 1.0),)
MEAN_4TH = ((M2, 2.0),)
VAR: Poly = {SQ_MEAN: 1.0, MEAN_SQ: -1.0}
UNDER: Poly = {SQ_MEAN: 1.0, ONE: 1e-5}
RSTD = power(UNDER, -0.5)
(((ROOT, _),),) = RSTD
(ROOT_KEY,) = RSTD


def refusal(call: Any, *args: Any) -> str:
    with pytest.raises(Refused) as why:
        call(*args)
    assert str(why.value) == why.value.message
    return why.value.code


X = Value("x", ("B", 5, 64), "float32", index=1)
LAST = Root(X, (2,), 64)
BOTH = Root(X, (1, 2), 320)
SQUARE = Root(Value("s", (64, 64), "float32", index=2), (1,), 64)
WHOLE = ((0,), (1,), (2,))
ROW = ((0,), (1,), ())
S = (-1,)


def leaf(*shape: Any, number: float | None = None, dtype: str = "float32") -> Value:
    return Value("v", None if shape == (None,) else shape, dtype, number, leaf=True, fixed=True, index=9)


def apply(kind: str, *facts: Fact, inputs: tuple[Value, ...] = (), dtype: str | None = "float32", shape: Any = None,
          **attrs: Any) -> Fact:  # fmt: skip
    """The rule of a kind on these facts; each operand is a value in float32 unless `inputs` has it."""
    given = inputs or tuple(Value(f"i{i}", ("B", 5, 64), "float32", index=20 + i) for i in range(len(facts)))
    node = Node(kind, list(given), [Value("out", shape, dtype, index=30)], attrs)
    return RULES[kind](node, list(facts))


def stat(beta: Poly, layout: Any = ROW, root: Root = LAST, types: str = "float32", **more: Any) -> Fact:
    return Fact(root, ZERO, ZERO, beta, layout, types=frozenset({types}), **more)


def line(alpha: Poly, beta: Poly = ZERO, kappa: Poly = ZERO, root: Root = LAST, **more: Any) -> Fact:
    return Fact(root, kappa, alpha, beta, WHOLE, **more)


x1 = line({ONE: 1.0})
half = Value("h", ("B", 5, 64), "float16", index=1)
wide = Value("w32", ("B", 5, 64), "float32", index=20)
hx = Root(half, (2,), 64)
C5 = Fact(LAST, ZERO, ZERO, {ONE: 5.0}, ())
PARAM = Fact(LAST, ZERO, ZERO, {PW: 1.0}, ((2,),))
