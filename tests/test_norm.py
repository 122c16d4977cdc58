"""Which norm a fact is read as, how exact it is, and of which nodes it is made."""

from __future__ import annotations

from typing import Any

import pytest

from normfuse.facts import M2, MEAN, MEAN_SQ, ONE, SQ_MEAN, ZERO, Fact, Poly, Root, add, mul, power, scale
from normfuse.graph import Value
from normfuse.norm import Norm, exact, is_op, kept, match, plain, precision, reads_x, region
from tests.algebra import PB, PW, RSTD, UNDER, VAR, W, half, line, refusal
from tests.build import Build

# -- reading a fact as a norm -----------------------------------------------------------------------------------------

STD = power({**VAR, ONE: 1e-5}, -0.5)
NORMED = mul(RSTD, {PW: 2.0})


@pytest.mark.parametrize(("alpha", "beta", "kind"), [
    (RSTD, ZERO, "rms_norm"), (NORMED, {PB: 1.0}, "rms_norm"), (STD, scale(mul(STD, {MEAN: 1.0}), -1), "layer_norm"),
    (STD, add(scale(mul(STD, {MEAN: 1.0}), -1), {PB: 1.0}), "layer_norm"), (STD, ZERO, "NF102"),
    (STD, scale(mul(STD, {MEAN: 1.0}), -1.1), "NF102"), (STD, scale(mul(STD, {MEAN: 1.0}), -1 - 1e-8), "layer_norm"),
    (scale(STD, 1e3), scale(mul(STD, {MEAN: 1.0}), -1e3 - 0.01), "NF102"), (STD, mul(STD, {MEAN: 1.0}), "NF102"),
    (scale(STD, 1e-3), scale(mul(STD, {MEAN: 1.0}), -1e-3 * (1 + 2e-6)), "NF102"),
    (RSTD, {MEAN: 1.0}, "NF106"), (RSTD, RSTD, "NF106"), (mul(RSTD, {MEAN: 1.0}), ZERO, "NF106"),
    (mul(RSTD, {SQ_MEAN: 1.0}), ZERO, "NF106"), (add(RSTD, {ONE: 1.0}), ZERO, "NF101"),
    (mul(RSTD, STD), ZERO, "NF101"), (add(RSTD, STD), ZERO, "NF101"), ({ONE: 1.0}, ZERO, "NF103"),
    (mul(RSTD, {((M2, -0.5),): 1.0}), ZERO, "NF103"), (mul(RSTD, {((M2, 0.5),): 1.0}), ZERO, "NF106"),
    (scale(STD, -1), ZERO, "NF102"), (power({ONE: 1.0, MEAN_SQ: -1.0}, -0.5), ZERO, "NF106"),
    (power({((M2, 0.5),): 1.0, MEAN: 1.0, ONE: 1.0}, -1.0), ZERO, "NF101"),
    ({((("T", 1, tuple(sorted({SQ_MEAN: 1.0, PW: 1.0, MEAN: 1.0}.items()))), -0.5),): 1.0}, ZERO, "NF104"),
    (power({**power(UNDER, 0.5), SQ_MEAN: 1.0, MEAN: 1.0}, -0.5), ZERO, "NF101"),
    ({((M2, -0.5),): 1.0}, ZERO, "NF103"), ({((M2, -0.5),): 1.0, ONE: 1.0}, ZERO, "NF101"),
    (power(UNDER, -1.0), ZERO, "NF105"), (power(UNDER, 0.5), ZERO, "NF105"), (power(UNDER, -0.25), ZERO, "NF105"),
    (power(add(power(UNDER, 0.5), {ONE: 1e-5}), -1.0), ZERO, "NF101"),
    (power(add({((M2, 0.5),): 1.0}, {ONE: 1e-5}), -1.0), ZERO, "NF101"),
    (power(add(power(UNDER, 0.5), {ONE: 1e-5}), -0.5), ZERO, "NF101"),
    (power({SQ_MEAN: 1.0, ONE: -1e-5}, -0.5), ZERO, "NF103"), (power(VAR, -0.5), ZERO, "NF103"),
    (power({SQ_MEAN: 1.0, MEAN_SQ: 1.0, ONE: 1e-5}, -0.5), ZERO, "NF106"),
    (power({SQ_MEAN: 1.0, MEAN_SQ: -0.5, ONE: 1e-5}, -0.5), ZERO, "NF106"),
    (power({SQ_MEAN: 1.0, MEAN: 1.0, ONE: 1e-5}, -0.5), ZERO, "NF106"),
    (power({MEAN_SQ: 1.0, ONE: 1e-5}, -0.5), ZERO, "NF106"),
    ({((("T", 1, tuple(sorted({SQ_MEAN: 1.0, PW: 1.0}.items()))), -0.5),): 1.0}, ZERO, "NF104"),
])  # fmt: skip
def test_match(alpha: Poly, beta: Poly, kind: str) -> None:
    fact = line(alpha, beta)
    if kind.startswith("NF"):
        assert refusal(match, fact) == kind
        return
    found = match(fact)
    assert found.kind == kind and found.eps == 1e-5
    assert found.weight == ({PW: 2.0} if alpha is NORMED else {ONE: 1.0})
    assert found.bias == ({PB: 1.0} if PB in beta else ZERO)


F32, F16, BF, F64 = "float32", "float16", "bfloat16", "float64"
UP, DOWN = ("cast", F32), ("cast", F16)


@pytest.mark.parametrize(("x", "trace", "types", "want"), [
    (F32, [("norm", F32)], F32, (F32, "none")),
    (F32, [("centre", F32), ("norm", F32), ("weight", F32), ("bias", F32)], F32,
                                                 (F32, "none")),
    (F16, [UP, ("norm", F32)], F32, (F32, "none")), (F16, [UP, ("norm", F32), DOWN], F32, (F32, "last")),
    (F16, [UP, ("norm", F32), ("weight", F32), DOWN], F32, (F32, "last")),
    (F16, [UP, ("norm", F32), DOWN, ("weight", F16)], F32, (F32, "first", F16)),
    (F16, [UP, ("norm", F32), DOWN, UP, ("weight", F32)], F32, (F32, "first", F16)),
    (F32, [("norm", F32), DOWN, ("weight", F16)], F32, (F32, "first", F16)),  # of a sum in float32: vLLM
    (F32, [("norm", F32), DOWN, UP, ("weight", F32)], F32, (F32, "first", F16)),
    (F16, [UP, ("norm", F32), DOWN, UP], F32, None), (F16, [UP, ("norm", F32), DOWN, ("cast", BF)], F32, None),
    (F16, [UP, ("norm", F32), DOWN, ("cast", BF), ("weight", BF)], F32, None),
    (F16, [UP, ("norm", F32), DOWN, ("weight", F16), UP], F32, None),
    (F16, [UP, ("norm", F32), DOWN, UP, ("cast", F64), ("weight", F64)], F32, None),
    (F16, [UP, ("norm", F32), ("weight", F32), DOWN, ("bias", F16)], F32, None),
    (F16, [("norm", F16), ("weight", F16)], F16, (F16, "none")),
    (F16, [("norm", F16), ("weight", F16), ("scale", F16)], F16, None),
    (F16, [("norm", F16), ("weight", F16), ("weight", F16)], F16, None),
    (F32, [("norm", F32), ("weight", F32), ("scale", F32)], F32, (F32, "none")),
    (F16, [UP, ("norm", F32), DOWN, ("norm", F16)], F32, None), (F16, [UP, ("norm", F16)], F16, None),
    (F16, [UP, ("norm", F32), DOWN, ("centre", F16)], F32, None),
    (F16, [UP, ("norm", F32), DOWN, ("weight", F32)], F32, None),
    (F32, [("norm", F32), ("mixed", F32)], F32, None), (F16, [UP, ("norm", F32)], F16, None),
    (BF, [UP, ("norm", F32), DOWN, ("weight", F16)], F32, (F32, "first", F16)),
    (BF, [UP, ("norm", F32), DOWN], F32, (F32, "last")),
    (F16, [UP, ("cast", F64), ("norm", F64)], F64, (F64, "none")), (F64, [("norm", F64), UP], F64, (F64, "last")),
    (F32, [("norm", F32), ("cast", F64)], F32, None),
])  # fmt: skip
def test_precision(x: str, trace: Any, types: str, want: Any) -> None:
    root = Root(Value("x", (4,), x), (0,), 4)
    fact = Fact(root, ZERO, RSTD, ZERO, ((0,),), tuple(trace), frozenset({types}))
    if want is None:
        assert refusal(precision, fact) == "NF117"
    else:
        assert precision(fact) == (*want, "")[:3]


def test_powers_of_two_are_exact() -> None:
    assert exact({ONE: 0.125, PW: -4.0}) and exact(ZERO) and not exact({ONE: 1.0, PW: 3.0}) and not exact({ONE: -0.75})
    assert exact({((W, 2.0),): 1.0}) and not exact({((W, -1.0),): 1.0})


def test_a_parameter_as_it_is() -> None:
    a, b = (Value(name, (64,), "float32") for name in "ab")
    one = (1.0, ((a, 1),))
    assert plain((one,))
    for expr in ((one, one), ((2.0, ((a, 1),)),), ((1.0, ((a, 1), (b, 1))),), ((1.0, ((a, 2),)),), ((1.0, ()),), ()):
        assert not plain(expr)


@pytest.mark.parametrize(("eps", "dtype", "holds"), [
    (1e-5, "float32", True), (1e-5, "float64", True), (2.0**-149, "float32", True), (2.0**-150, "float32", False),
    (2.0**-150, "float64", True), (2.0**-1074, "float64", True), (1e-9, "int8", True), (0.0, "float16", True),
    (2.0**-10 + 2.0**-20, "float16", True), (2.0**-10 + 2.0**-21, "float16", False), (1e-5, "float16", False),
    (2.0**-10 + 2.0**-17, "bfloat16", True), (2.0**-10 + 2.0**-18, "bfloat16", False),
    (2.0**-24, "float16", True), (3 * 2.0**-24, "float16", True), (2.0**-25, "float16", False),  # the least there are
    (float("inf"), "float16", False), (2.0**-25, "bfloat16", True),
    (2.0**-133, "bfloat16", True), (2.0**-134, "bfloat16", False),
])  # fmt: skip
def test_an_eps_that_a_type_holds(eps: float, dtype: str, holds: bool) -> None:
    assert kept(eps, dtype) is holds


def test_what_an_operator_reads() -> None:
    def norm(compute: str, cast_: str, narrow: str = "") -> Norm:
        return Norm("rms_norm", half, (2,), 64, 1e-5, None, None, compute, cast_, "float16", narrow)

    assert reads_x(norm(F32, "first", F16)) and not reads_x(norm(F32, "first", BF))
    assert reads_x(norm(F16, "none")) and not reads_x(norm(F32, "none"))
    assert not reads_x(norm(F16, "last")) and not reads_x(norm(F32, "last"))


# -- what a norm is made of -------------------------------------------------------------------------------------------


def test_the_nodes_of_a_norm_last_first() -> None:
    g = Build()
    native = object()
    shifted = g.op("add", g.x, g.c(1.0))
    scaled = g.op("mul", g.w, g.c(2.0))
    square = g.op("square", shifted)
    mean = g.mean(square)
    rstd = g.op("rsqrt", g.op("add", mean, g.c(1e-5)))
    y = g.op("mul", g.op("mul", shifted, rstd), scaled)
    (site,) = g.found(y).sites
    assert [n.kind for n in region(y, site.norm)] == ["mul", "mul", "rsqrt", "add", "mean", "square"]
    assert site.norm.x is shifted and site.norm.parameters() == [scaled] and not site.is_op and not is_op(y, site.norm)
    for node in region(y, site.norm):
        node.native = native
    assert is_op(y, site.norm)
    copy = g.op("reshape", g.op("identity", y), shape=("B", "S", 64))
    assert is_op(copy, site.norm)  # copies and views aside
    g.graph.nodes[-3].native = None
    assert not is_op(y, site.norm)
    for node in region(y, site.norm):
        node.native = None
    assert not is_op(y, site.norm)
    assert region(shifted, site.norm) == []
