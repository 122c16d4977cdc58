"""The rules of `transfer`, each with what it gives and where exactly it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from normfuse.facts import M2, MEAN, MEAN_SQ, ONE, SQ_MEAN, ZERO, Fact, Poly, Refused, Root, formula, power
from normfuse.graph import Value
from normfuse.norm import match
from normfuse.transfer import SCALED
from tests.algebra import (
    BOTH, C5, LAST, PARAM, PW, ROOT_KEY, ROW, RSTD, S, UNDER, VAR, W, WHOLE, X, apply, half, hx, leaf, line,
    refusal, stat, wide, x1,
)  # fmt: skip

# -- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "facts", "text"), [
    ("add", (x1, x1), "2*x"), ("sub", (x1, stat({MEAN: 1.0})), "(x - mean(x))"), ("sub", (C5, x1), "-x + 5"),
    ("sub", (line({ONE: 1.0}, kappa={ONE: 2.0}), line({ONE: 3.0}, {ONE: 1.0}, {ONE: 1.0})), "x^2 - 2*x - 1"),
    ("mul", (line({ONE: 2.0}, {ONE: 3.0}), line({ONE: 5.0}, {ONE: 7.0})), "10*x^2 + 29*x + 21"),
    ("mul", (line(ZERO, ZERO, {ONE: 2.0}), C5), "10*x^2"), ("mul", (C5, line(ZERO, ZERO, {ONE: 2.0})), "10*x^2"),
    ("mul", (x1, line(ZERO, ZERO, {ONE: 1.0})), "NF112"), ("mul", (line(ZERO, ZERO, {ONE: 1.0}), x1), "NF112"),
    ("div", (x1, C5), "0.2*x"), ("div", (C5, x1), "NF105"), ("div", (x1, stat({MEAN: 1.0})), "x*mean(x)^-1"),
    ("neg", (line({ONE: 1.0}, {ONE: 2.0}, {ONE: 3.0}),), "-3*x^2 - x - 2"), ("abs", (x1,), "|x|"),
    ("abs", (stat({SQ_MEAN: 1.0}),), "mean(x^2)"), ("abs", (stat({MEAN: 1.0}),), "|mean(x)|"),
    ("abs", (line(ZERO, ZERO, {ONE: 1.0}),), "NF112"), ("abs", (line({ONE: 1.0}, ZERO, {ONE: 1.0}),), "NF112"),
    ("square", (line({ONE: 1.0}, absolute=True),), "x^2"), ("square", (line(ZERO, ZERO, {ONE: 1.0}),), "NF112"),
    ("square", (stat({MEAN: 3.0}),), "9*mean(x)^2"), ("sqrt", (stat(UNDER),), "(mean(x^2) + 1e-05)^1/2"),
    ("rsqrt", (stat(UNDER),), "(mean(x^2) + 1e-05)^-1/2"), ("reciprocal", (stat({SQ_MEAN: 2.0}),), "0.5*mean(x^2)^-1"),
    ("sqrt", (x1,), "NF112"), ("identity", (x1,), "x"),
    ("mul", (line({ONE: 1.0}, absolute=True), line({ONE: 1.0}, absolute=True)), "x^2"),
    ("mul", (x1, line({ONE: 1.0}, absolute=True)), "NF112"), ("mul", (line({ONE: 1.0}, absolute=True), x1), "NF112"),
    ("div", (C5, line({ONE: 1.0}, {ONE: 5.0})), "NF105"), ("abs", (line({ONE: 1.0}, absolute=True),), "|x|"),
    ("mul", (line({ONE: 1.0}, absolute=True), C5), "NF112"), ("neg", (line({ONE: 1.0}, absolute=True),), "NF112"),
    ("add", (C5, line({ONE: 1.0}, absolute=True)), "NF112"),
    ("mul", (stat({MEAN: 1.0}, partial=frozenset({2})), C5), "NF106"),
    ("add", (C5, stat({MEAN: 1.0}, partial=frozenset({2}))), "NF106"),
    ("abs", (stat({SQ_MEAN: 1.0}, partial=frozenset({2})),), "NF106"),
    ("neg", (stat({MEAN: 1.0}, partial=frozenset({2})),), "NF106"),
    ("mul", (line({ONE: 1.0}, absolute=True), line({ONE: 1.0}, {ONE: 1.0}, absolute=True)), "NF112"),
    ("sqrt", (stat({MEAN: 1.0}, absolute=True),), "NF112"),
    ("square", (stat({MEAN: 1.0}, absolute=True),), "mean(x)^2"),
])  # fmt: skip
def test_rule(kind: str, facts: tuple[Fact, ...], text: str) -> None:
    if text.startswith("NF"):
        assert refusal(lambda: apply(kind, *facts)) == text
    else:
        assert formula(apply(kind, *facts)) == text


@pytest.mark.parametrize(("q", "text"), [
    (2.0, "x^2"), (1.0, "x"), (3.0, "NF112"), (0.5, "NF112"), (None, "NF105"), (0.3, "NF105"), (-1.0, "NF112"),
    (0.0, "NF112"),
])  # fmt: skip
def test_power_of_x(q: float | None, text: str) -> None:
    inputs = (X, leaf(number=q))
    fact = Fact(LAST, ZERO, ZERO, {ONE: q or 0.0}, ())
    if text.startswith("NF"):
        assert refusal(lambda: apply("pow", x1, fact, inputs=inputs)) == text
    else:
        assert formula(apply("pow", x1, fact, inputs=inputs)) == text
        assert apply("pow", x1, fact, inputs=inputs).via is X


@pytest.mark.parametrize(("q", "text"), [(1.0, "|mean(x)|"), (2.0, "mean(x)^2"), (-1.0, "NF112"), (4.0, "NF112")])
def test_power_of_a_magnitude(q: float, text: str) -> None:
    def call() -> Fact:
        return apply("pow", stat({MEAN: 1.0}, absolute=True), C5, inputs=(X, leaf(number=q)))

    assert refusal(call) == text if text.startswith("NF") else formula(call()) == text


@pytest.mark.parametrize("q", [math.inf, -math.inf, math.nan])
def test_a_power_that_is_no_number(q: float) -> None:
    assert refusal(lambda: apply("pow", stat(UNDER), C5, inputs=(X, leaf(number=q)))) == "NF105"


@pytest.mark.parametrize("q", [0.5, -0.5, 0.25, 1.75, -1.0, 2.0, 1 / 3])
def test_power_of_a_statistic(q: float) -> None:
    def call() -> Fact:
        return apply("pow", stat(UNDER), C5, inputs=(X, leaf(number=q)))

    wide_exponent = replace(C5, layout=((0,), (1,), S))
    assert q == 1 / 3 or apply("pow", stat(UNDER), wide_exponent, inputs=(X, leaf(number=q))).layout == ((0,), (1,), S)
    if q == 1 / 3:
        assert refusal(call) == "NF105"
    else:
        assert call().beta == power(UNDER, q) and call().layout == ROW


@pytest.mark.parametrize(("beta", "c", "kept"), [
    (VAR, 0.0, True), (VAR, -1.0, True), (VAR, 1e-9, False), (UNDER, 1e-5, True), (UNDER, 1e-4, False),
    ({MEAN: 1.0}, -1e9, False), (VAR, None, False),
])  # fmt: skip
def test_a_clamp_that_never_acts(beta: Poly, c: float | None, kept: bool) -> None:
    number_, first = leaf(number=c), Value("m", ("B", 5, 1), "float32")
    for inputs, facts in (((first, number_), (stat(beta), C5)), ((number_, first), (C5, stat(beta)))):
        if kept:
            out = apply("max", *facts, inputs=inputs, dtype="float64")
            assert out.beta == beta and out.layout == ROW and out.types == {"float32", "float64"}
        else:
            assert refusal(lambda i=inputs, f=facts: apply("max", *f, inputs=i)) == "NF119"
    assert refusal(lambda: apply("max", x1, C5, inputs=(X, leaf(number=-9.0)))) == "NF119"


def cast(fact: Fact, old: str, new: str) -> Fact:
    return apply("cast", fact, inputs=(Value("c", ("B", 5, 64), old, index=5),), dtype=new)


def test_casts_are_events_where_x_is() -> None:
    h = Fact(hx, ZERO, {ONE: 1.0}, ZERO, WHOLE)
    up = cast(h, "float16", "float32")
    assert up.trace == (("cast", "float32"),) and up.via is not None and up.via.name == "c"
    assert cast(up, "float32", "float16").trace == ()  # there and back again
    assert cast(up, "float32", "float64").trace == (("cast", "float32"), ("cast", "float64"))
    assert refusal(cast, up, "float32", "bfloat16") == "NF117"
    assert cast(h, "float16", "float16").trace == ()
    assert refusal(cast, h, "float16", "bfloat16") == refusal(cast, x1, "float32", "float16") == "NF117"
    assert refusal(cast, x1, "float64", "float32") == refusal(cast, x1, "bfloat16", "float16") == "NF117"
    assert refusal(cast, line({SQ_MEAN: 1.0}), "float32", "float16") == "NF117"
    assert refusal(cast, x1, "int32", "float32") == refusal(cast, x1, "float32", "int64") == "NF113"
    done = line(RSTD, trace=(("norm", "float32"),))
    assert cast(done, "float32", "float16").trace == (("norm", "float32"), ("cast", "float16"))
    done = Fact(hx, ZERO, RSTD, ZERO, WHOLE, (("norm", "float32"),))
    assert cast(done, "float32", "float16").trace == (("norm", "float32"), ("cast", "float16"))
    squares = line(ZERO, ZERO, {ONE: 1.0}, types=frozenset({"float16"}))
    assert cast(squares, "float16", "float32").types == {"float16", "float32"} and not cast(
        squares, "float16", "float32").trace  # fmt: skip
    assert refusal(cast, squares, "float32", "float16") == "NF117"
    assert cast(stat(UNDER), "float32", "float16").types == {"float32", "float16"}
    twice = Fact(hx, ZERO, {ONE: 1.0}, ZERO, WHOLE, (("cast", "float32"), ("cast", "float64")))
    assert cast(twice, "float64", "float32").trace == (("cast", "float32"),)


@pytest.mark.parametrize(("factor", "whole"), [
    (1 - 1e-8, 1.0), (1 + 1e-8, 1.0), (0.5 - 1e-8, 0.5), (-1 + 1e-8, -1.0), (1 - 1e-5, 1 - 1e-5), (0.75, 0.75),
    (1 + 4.5e-7, 1.0),
])  # fmt: skip
def test_a_power_of_two_but_for_roundings_is_one(factor: float, whole: float) -> None:
    assert match(line({ROOT_KEY: factor})).weight == {ONE: whole}


@pytest.mark.parametrize(("dtype", "under", "left"), [
    ("float32", 25.0, False), ("float32", 1.0, True), ("float32", -25.0, True), ("float64", 25.0, True),
    ("float16", 25.0, True),
])  # fmt: skip
def test_a_factor_that_the_statistic_has_too_leaves_no_trace(dtype: str, under: float, left: bool) -> None:
    """5 x (25 mean(x^2) + eps)^-1/2 is a norm of x; not where 5 x is rounded to a narrow or another type."""
    scaled = apply("mul", x1, C5, dtype="float16" if dtype == "float16" else "float32")
    value = Value("i0", ("B", 5, 64), dtype, index=20)  # no cast in between
    done = apply("mul", scaled, stat(power({SQ_MEAN: abs(under), ONE: 1e-3}, -0.5 if under > 0 else -0.75)),
                 inputs=(value, wide), dtype=dtype)  # fmt: skip
    assert done.trace == (*scaled.trace * left, ("norm", dtype))


def test_traces_of_elementwise_results() -> None:
    centred = apply("sub", x1, stat({MEAN: 1.0}))
    assert centred.trace == (("centre", "float32"),)
    assert apply("add", x1, C5).trace == apply("add", C5, x1).trace == (("bias", "float32"),)
    assert apply("add", x1, PARAM).trace == (("bias", "float32"),)
    assert apply("add", x1, stat({MEAN: 1.0, ONE: 1.0})).trace == (("centre", "float32"), ("bias", "float32"))
    assert apply("mul", x1, PARAM).trace == apply("mul", PARAM, x1).trace == (("weight", "float32"),)
    assert apply("mul", x1, C5).trace == (("scale", "float32"),)
    for c, rounds in ((2.0, False), (-0.25, False), (1.5, True), (-3.0, True)):
        assert apply("mul", x1, replace(C5, beta={ONE: c})).trace == (("scale", "float32"),) * rounds
    third = line({ONE: 1 / 3}, trace=(("scale", "float32"),))
    assert apply("mul", third, replace(C5, beta={ONE: 3.0})).trace == (("scale", "float32"),) * 2  # no statistic has it
    part = line({ONE: 2.0, PW: 1.0}, trace=(("scale", "float32"),))
    assert apply("mul", part, stat(RSTD)).trace == (("scale", "float32"), ("norm", "float32"))
    assert apply("mul", x1, stat(RSTD)).trace == apply("mul", stat(UNDER), x1).trace == (("norm", "float32"),)
    assert apply("mul", x1, stat({((M2, 1.0), (W, 1.0)): 1.0})).trace == (("norm", "float32"), ("weight", "float32"))
    assert apply("add", x1, apply("mul", x1, PARAM)).trace == (("weight", "float32"), ("weight", "float32"))
    assert not apply("add", x1, x1).trace and not apply("sub", x1, line({ONE: -1.0})).trace  # twice x rounds nothing
    for other in (line({ONE: 2.0}), line({ONE: 1.0}, {ONE: 1.0}), line({ONE: 1.0}, trace=(("norm", "float32"),))):
        assert apply("add", x1, other).trace == (*other.trace, ("scale", "float32"))
    assert apply("mul", x1, x1).trace == () and apply("mul", x1, x1).types == {"float32"}
    assert apply("mul", stat(UNDER), C5, dtype="float64").types == {"float32", "float64"}
    assert not apply("add", stat(UNDER), C5).trace
    a, b = line({ONE: 1.0}, trace=(("weight", "float32"),)), line({ONE: 1.0}, trace=(("norm", "float32"),))
    assert ("mixed", "float32") in apply("add", a, b).trace
    assert ("mixed", "float32") not in apply("add", a, x1).trace and apply("add", x1, a).trace[0] == a.trace[0]
    long = apply("add", x1, a)
    assert long.via is not None and long.via.name == "i1"
    first = apply("add", a, x1)
    assert first.via is not None and first.via.name == "i0"
    second = apply("mul", PARAM, x1)
    assert second.via is not None and second.via.name == "i1"
    promoted = apply("mul", Fact(hx, ZERO, {ONE: 1.0}, ZERO, WHOLE), PARAM, inputs=(half, wide))
    assert promoted.trace == (("cast", "float32"), ("weight", "float32"))
    odd = apply("mul", Fact(hx, ZERO, {ONE: 1.0}, ZERO, WHOLE), PARAM, inputs=(Value("q", (), "int8"), wide))
    assert odd.trace == (("weight", "float32"),)
    assert apply("mul", x1, PARAM, dtype=None).trace == (("weight", "?"),)
    squares = apply("mul", line({ONE: 1.0}, trace=(("weight", "float16"), ("cast", "float32"))), x1)
    assert squares.types == {"float32", "float16"}
    assert not squares.trace and apply("mul", line({ONE: 1.0}, trace=(("cast", "float64"),)), x1).types == {"float32"}
    shifted = line({ONE: 1.0}, {ONE: 1.0})
    assert not apply("mul", shifted, shifted).trace and apply("mul", shifted, shifted).types == {"float32"}
    assert apply("add", apply("mul", x1, PARAM), x1).trace[-1] == ("weight", "float32")
    assert apply("neg", stat(UNDER), dtype="float64").types == {"float32", "float64"}
    both = apply("neg", line({ONE: 1.0}, ZERO, {ONE: 1.0}, trace=(("weight", "float16"),)))
    assert not both.trace and both.types == {"float32", "float16"}
    negative = apply("neg", line({ONE: 1.0}, trace=(("weight", "float16"),)), dtype="float16")
    assert negative.trace == (("weight", "float16"),) and negative.types == frozenset()
    less = apply("neg", line(ZERO, ZERO, {ONE: 1.0}, trace=(("weight", "float16"), ("cast", "float64"))))
    assert less.trace == () and less.types == {"float32", "float16"}


@pytest.mark.parametrize(("factor", "dtype", "scaled"), [
    (0.5, "float16", True), (-0.5, "float16", True), (1.0, "float16", False), (2.0, "float16", False),
    (1.0 - 1e-7, "float16", False), (0.5, "bfloat16", False), (0.5, "float32", False),
])  # fmt: skip
def test_a_square_of_x_scaled_down_in_float16(factor: float, dtype: str, scaled: bool) -> None:
    """(x / 64)^2 is finite where x^2 is not."""
    part = line({ONE: factor})
    assert apply("mul", part, part, dtype=dtype).types == {dtype} | ({SCALED} if scaled else set())
    assert SCALED not in apply("mul", part, stat({ONE: 0.25}), dtype=dtype).types  # and this is no square
    squares = line(ZERO, ZERO, {ONE: 1.0})
    for facts in ((squares, stat({ONE: 0.25})), (stat({ONE: 0.25}), squares)):
        assert SCALED not in apply("mul", *facts, dtype=dtype).types


@pytest.mark.parametrize(("kind", "fact", "axes", "text"), [
    ("mean", x1, (2,), "mean(x)"), ("sum", x1, (2,), "64*mean(x)"), ("mean", line(ZERO, ZERO, {ONE: 2.0}), (2,),
                                                                   "2*mean(x^2)"),
    ("mean", line({ONE: 2.0}, {ONE: 3.0}, {ONE: 4.0}), (2,), "2*mean(x) + 4*mean(x^2) + 3"),
    ("sum", line({ONE: 2.0}, {ONE: 3.0}, {ONE: 4.0}), (2,), "128*mean(x) + 256*mean(x^2) + 192"),
    ("mean", stat({MEAN: 1.0}), (2,), "mean(x)"), ("sum", stat({MEAN: 1.0}), (2,), "mean(x)"),
    ("mean", x1, (1,), "NF106"), ("mean", x1, (0, 2), "NF106"), ("mean", line({PW: 1.0}), (2,), "NF106"),
    ("mean", line({ONE: 1.0}, {PW: 1.0}), (2,), "NF106"), ("mean", line(ZERO, ZERO, {PW: 1.0}), (2,), "NF106"),
    ("mean", x1, None, "NF114"), ("mean", line({ONE: 1.0}, absolute=True), (2,), "NF112"),
    ("mean", stat({MEAN: 1.0}, ((0,), (1,), S)), (2,), "mean(x)"),
    ("sum", stat({MEAN: 1.0}, ((0,), (1,), S)), (2,), "NF107"),
    ("mean", stat({MEAN: 1.0}), (1,), "NF106"), ("mean", replace(x1, layout=((0,), (), (2,))), (1,), "NF121"),
    ("var", x1, (2,), "var(x)"), ("std", x1, (2,), "(var(x))^1/2"), ("vecnorm", x1, (2,), "8*mean(x^2)^1/2"),
    ("var", line({ONE: 2.0}, {ONE: 7.0}), (2,), "4*var(x)"), ("var", line(ZERO, ZERO, {ONE: 1.0}), (2,), "NF112"),
    ("vecnorm", line(ZERO, ZERO, {ONE: 1.0}), (2,), "NF112"), ("var", x1, (1,), "NF106"),
    ("var", replace(x1, root=BOTH), (2,), "NF106"), ("vecnorm", replace(x1, root=BOTH), (2,), "NF106"),
])  # fmt: skip
def test_reduction(kind: str, fact: Fact, axes: Any, text: str) -> None:
    if text.startswith("NF"):
        assert refusal(lambda: apply(kind, fact, axes=axes, keepdims=True)) == text
        return
    out = apply(kind, fact, axes=axes, keepdims=True)
    assert formula(out) == text and out.layout == ROW and out.types >= {"float32"} and not out.trace
    assert apply(kind, fact, axes=axes, keepdims=False).layout == ROW[:2]


def test_a_mean_in_two_steps_and_its_types() -> None:
    x = replace(x1, root=BOTH, trace=(("weight", "float16"), ("cast", "float32")), types=frozenset({"bfloat16"}))
    first = apply("sum", x, axes=(2,), keepdims=True, dtype="float64")
    assert first.partial == {2} and first.alpha == {ONE: 64.0} and first.types == {"float64", "float16", "bfloat16"}
    second = apply("sum", first, axes=(1,), keepdims=True)
    assert second.beta == {MEAN: 320.0} and not second.partial and not second.alpha and second.layout == ((0,), (), ())
    assert apply("sum", x, axes=(1, 2), keepdims=False).layout == ((0,),)
    rows = replace(x1, root=Root(Value("u", ("B", 5, "N"), "float32"), (2,), None))
    assert refusal(lambda: apply("sum", rows, axes=(2,), keepdims=True)) == "NF115"
    assert apply("mean", rows, axes=(2,), keepdims=True).beta == {MEAN: 1.0}


@pytest.mark.parametrize(("correction", "factor"), [
    (0, 1.0), (1, 64 / 63), (2, 64 / 62), (63, 64.0), (64, None), (65, None),
])  # fmt: skip
def test_an_unbiased_variance(correction: int, factor: float | None) -> None:
    if factor is None:
        assert refusal(lambda: apply("var", x1, axes=(2,), correction=correction)) == "NF110"
        return
    out = apply("var", x1, axes=(2,), correction=correction)
    assert out.beta == pytest.approx({SQ_MEAN: factor, MEAN_SQ: -factor})
    assert apply("std", x1, axes=(2,), correction=correction).beta == power(out.beta, 0.5)
    unsized = replace(x1, root=Root(X, (2,), None))
    assert apply("var", unsized, axes=(2,)).beta == VAR
    if correction:
        assert refusal(lambda: apply("var", unsized, axes=(2,), correction=correction)) == "NF110"


@pytest.mark.parametrize(("kind", "attrs", "fact", "shape", "layout"), [
    ("unsqueeze", {"axes": (0,)}, x1, None, ((), *WHOLE)), ("unsqueeze", {"axes": (-1,)}, x1, None, (*WHOLE, ())),
    ("unsqueeze", {"axes": (3, 1)}, x1, None, ((0,), (), (1,), (), (2,))),
    ("squeeze", {"axes": (2,)}, stat(UNDER), None, ROW[:2]),
    ("squeeze", {"axes": (-1,)}, stat(UNDER), None, ROW[:2]), ("squeeze", {"axes": (1,)}, x1, None, "NF107"),
    ("squeeze", {"axes": (1, 2)}, stat(UNDER), None, "NF107"),
    ("transpose", {"perm": (2, 0, 1)}, x1, None, ((2,), (0,), (1,))),
    ("expand", {}, stat(UNDER), ("B", 5, 64), ((0,), (1,), S)), ("expand", {}, stat(UNDER), ("B", 5, 1), ROW),
    ("expand", {}, stat(UNDER), (7, "B", 5, 64), (S, (0,), (1,), S)), ("expand", {}, x1, ("B", 5, 64), WHOLE),
    ("expand", {}, x1, (1, "B", 5, 64), ((), *WHOLE)), ("expand", {}, x1, (7, "B", 5, 64), "NF108"),
    ("expand", {}, x1, ("C", 5, 64), "NF108"), ("expand", {}, x1, (None, 5, 64), "NF108"),
    ("expand", {}, x1, None, "NF115"), ("reshape", {}, x1, None, "NF115"),
    ("reshape", {}, x1, ("n", 64), ((0, 1), (2,))), ("reshape", {}, x1, ("n", 64, 1), ((0, 1), (2,), ())),
    ("reshape", {}, stat(UNDER, ((0,), (1,), S)), ("n", 64), ((0, 1), S)), ("reshape", {}, x1, ("B", 10, 32), "NF106"),
    ("reshape", {}, stat(UNDER, ((0,), (1,), S)), ("B", 5, 64), ((0,), (1,), S)),
    ("reshape", {}, stat(UNDER, ((0,), (1,), S)), ("n", 32), "NF107"),
    ("reshape", {}, stat(UNDER, ((0,), S, S)), ("B", 1, 5, 64), ((0,), (), S, S)),
    ("reshape", {}, stat(UNDER, (S, S, S)), ("B", 5, 64), (S, S, S)),
    ("reshape", {}, stat(UNDER, (S, S, S)), (1, "B", 5, 64), ((), S, S, S)),
])  # fmt: skip
def test_view(kind: str, attrs: dict[str, Any], fact: Fact, shape: Any, layout: Any) -> None:
    if isinstance(layout, str):
        assert refusal(lambda: apply(kind, fact, shape=shape, **attrs)) == layout
    else:
        out = apply(kind, fact, shape=shape, **attrs)
        assert out.layout == layout and out.via is not None and out.via.name == "i0"
    if kind in ("reshape", "expand") and shape is not None:
        unknown = (Value("i0", None, "float32"),)
        assert refusal(lambda: apply(kind, fact, inputs=unknown, shape=shape)) == "NF115"


def test_expand_to_a_size_that_is_not_known() -> None:
    """Nor is the old one: they may differ."""
    inputs = (Value("i0", (None, 5, 64), "float32"),)
    assert refusal(lambda: apply("expand", x1, inputs=inputs, shape=(None, 5, 64))) == "NF108"


def test_operators_that_are_norms() -> None:
    rms = apply("rms_norm", line({ONE: 1.0}, trace=(("cast", "float32"),)), axes=(2,), eps=1e-5, dtype="float32")
    assert formula(rms) == "x*(mean(x^2) + 1e-05)^-1/2" and rms.trace == (("cast", "float32"), ("norm", "float32"))
    assert rms.types == {"float32"} and rms.layout == WHOLE
    assert formula(apply("layer_norm", x1, axes=(2,), eps=1e-5)) == "(x - mean(x))*(var(x) + 1e-05)^-1/2"
    shifted = line({ONE: 1.0}, {ONE: 3.0})
    assert formula(apply("layer_norm", shifted, axes=(2,), eps=1e-5)) == "(x - mean(x))*(var(x) + 1e-05)^-1/2"
    assert "6*mean(x)" in formula(apply("rms_norm", shifted, axes=(2,), eps=1e-5))
    for kind in ("rms_norm", "layer_norm"):
        assert refusal(lambda k=kind: apply(k, replace(x1, root=BOTH), axes=(2,), eps=1e-5)) == "NF106"
        assert refusal(lambda k=kind: apply(k, replace(x1, absolute=True), axes=(2,), eps=1e-5)) == "NF112"


# -- matrix products --------------------------------------------------------------------------------------------------

COLUMN, FLAT = ((0,), (2,), ()), ((0,), (), (2,))


def matrix(layout: Any, alpha: Poly = ZERO, beta: Poly = ZERO, **more: Any) -> Fact:
    return Fact(LAST, ZERO, alpha, beta, layout, **more)


MX = {ONE: 1.0}


@pytest.mark.parametrize(("a", "b", "text", "layout"), [
    (matrix(FLAT, MX), matrix(COLUMN, MX), "64*mean(x^2)", ((0,), (), ())),  # a row with itself
    (matrix(((2,),), MX), matrix(((2,),), MX), "NF106", None),
    (matrix(FLAT, MX), matrix(((2,),), beta=MX), "64*mean(x)", ((0,), ())),  # with a vector of ones
    (matrix(WHOLE, MX), matrix(((2,),), beta={ONE: 0.5}), "32*mean(x)", ROW[:2]),
    (matrix(WHOLE, MX), matrix(((2,), ()), beta={ONE: 1 / 64}), "mean(x)", ROW),
    (matrix(WHOLE, MX), matrix(((2,), S), beta={ONE: 1 / 64}), "mean(x)", ((0,), (1,), S)),
    (matrix(((), (2,)), beta={ONE: 1 / 64}), matrix(COLUMN, MX), "mean(x)", ((0,), (), ())),
    (matrix((S, (2,)), beta={ONE: 1 / 64}), matrix(COLUMN, MX), "NF106", None),
    (matrix(WHOLE, MX), matrix(((), (2,), (1,)), MX), "NF106", None),  # rows with rows
    (matrix(FLAT, MX), matrix(((0,), (2,), (1,)), MX), "NF106", None),
    (matrix(WHOLE, MX), matrix(COLUMN, MX), "NF106", None),
    (matrix(WHOLE, MX), matrix(((1,), ()), beta=MX), "NF106", None),
    (matrix(WHOLE, MX), matrix(((1,),), beta=MX), "NF106", None),
    (matrix(WHOLE, MX), matrix((), beta=MX), "NF106", None),
    (matrix(((2,),), MX), matrix(((2,), ()), beta=MX), "NF106", None),
    (matrix((S, (0,), (2,)), MX), matrix(((2,), ()), beta=MX), "NF106", None),
    (matrix(WHOLE, MX), matrix((S, (2,), ()), beta=MX), "NF106", None),
    (matrix((*ROW[:2], (1,)), MX), matrix(((1,), ()), beta=MX), "NF106", None),
    (matrix(((0,), (2,), (1,)), MX), matrix(((1,), ()), beta=MX), "NF106", None),
    (matrix(WHOLE, MX), matrix((S, ()), beta=MX), "64*mean(x)", ROW),
    (matrix((S, S), beta=MX), matrix(COLUMN, MX), "NF106", None),
    (matrix(((), S), beta=MX), matrix(COLUMN, MX), "64*mean(x)", ((0,), (), ())),
    (matrix(((0,), S), beta={MEAN: 1.0}), matrix((S, ()), beta={MEAN: 2.0}), "NF106", None),
    (matrix(((), ()), beta={MEAN: 1.0}), matrix(((), ()), beta={MEAN: 2.0}), "2*mean(x)^2", ((), ())),
    (matrix(((0,), ()), beta={MEAN: 1.0}), matrix(((), ()), beta={MEAN: 2.0}), "NF106", None),
    (matrix(((0,), S, ()), beta={MEAN: 1.0}), matrix(((), ()), beta={ONE: 2.0}), "2*mean(x)", ((0,), S, ())),
    (matrix(FLAT, {PW: 1.0}), matrix(COLUMN, MX), "NF106", None),
    (matrix(FLAT, MX, absolute=True), matrix(COLUMN, MX), "NF112",
                                                                   None),
])  # fmt: skip
def test_matrix_product(a: Fact, b: Fact, text: str, layout: Any) -> None:
    if layout is None:
        assert refusal(lambda: apply("matmul", a, b)) == text
        return
    out = apply("matmul", a, b, dtype="float64")
    assert (formula(out), out.layout) == (text, layout) and out.types == {"float64"} and not out.trace


def test_numbers_beyond_all_are_refused() -> None:
    """A file may scale by 1e308 twice: no step of the algebra may meet an infinity."""
    huge = replace(C5, beta={ONE: 1e308})
    once = apply("mul", x1, huge)
    assert once.alpha == {ONE: 1e308}
    for kind, facts in (("mul", (once, huge)), ("add", (once, once)), ("sub", (once, apply("neg", once)))):
        with pytest.raises(Refused, match="beyond all numbers") as why:
            apply(kind, *facts)
        assert why.value.code == "NF100"
    assert apply("sub", once, once).alpha == {}
