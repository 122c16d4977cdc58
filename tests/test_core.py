"""The algebra law by law: what each function of `facts`, `transfer` and `norm` gives, and where exactly it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from normfuse.facts import (
    M1, M2, MAX_TERMS, MEAN, MEAN_SQ, ONE, SQ_MEAN, ZERO, Atom, Fact, Poly, Refused, Root, add, bound, constant,
    formula, formula_poly, free, has, mul, number, power, root_poly, scale, single,
)  # fmt: skip
from normfuse.graph import Node, Value
from normfuse.norm import Norm, exact, is_op, match, precision, reads_x, region
from normfuse.transfer import RULES, align, broadcast, identity_layout, regroup, spans
from tests.build import Build

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


# -- polynomials ------------------------------------------------------------------------------------------------------


def test_sums_drop_what_cancels_to_rounding_and_no_more() -> None:
    p = {ONE: 2.0, MEAN: 3.0}
    assert constant(0) == ZERO and constant(2.0) == {ONE: 2.0}
    assert add(ZERO, p) == add(p, ZERO) == p
    assert add(p, {ONE: -2.0}) == {MEAN: 3.0}
    assert add(p, {ONE: -2.0 - 1e-13, PW: 1.0}) == {MEAN: 3.0, PW: 1.0}
    assert add({ONE: 1.0}, {ONE: -1.0 + 1e-11}) == {ONE: pytest.approx(1e-11)}
    assert add({ONE: 1e-14}, {MEAN: 1.0}) == {ONE: 1e-14, MEAN: 1.0}  # small beside another term is not rounding
    assert add({ONE: 2.0**60}, {ONE: -(2.0**60) + 2.0**10}) == ZERO
    assert p == {ONE: 2.0, MEAN: 3.0}


def test_a_polynomial_has_at_most_so_many_terms() -> None:
    wide: Poly = {((("p", i, "w"), 1.0),): 1.0 for i in range(MAX_TERMS - 1)}
    assert MAX_TERMS == 12 and len(add(wide, {ONE: 1.0})) == MAX_TERMS
    assert refusal(add, wide, {ONE: 1.0, MEAN: 1.0}) == "NF100"


@pytest.mark.parametrize(("a", "c", "product"), [
    (48.0, single(1 / 48), 1.0), (single(1 / 48), 48.0, 1.0), (-48.0, single(1 / 48), -1.0), (3.0, 0.5, 1.5),
    (1.0, 1 + 1e-9, 1 + 1e-9), (3.0, 0.333333, 3.0 * 0.333333), (48.0, single(1 / 47), 48.0 * single(1 / 47)),
    (1.5, single(1 / 1.5), 1.5 * single(1 / 1.5)), (2.0, 4.0, 8.0),
    (48.0, 1 / 48 * (1 + 5e-7), 48.0 * (1 / 48 * (1 + 5e-7))), (5120.0, single(1 / 5120), 1.0),
])  # fmt: skip
def test_n_times_its_reciprocal_in_float32_is_one(a: float, c: float, product: float) -> None:
    assert scale({MEAN: a}, c) == {MEAN: product} == mul({MEAN: a}, constant(c))
    assert scale({MEAN: a}, 0) == ZERO


def test_products_merge_exponents() -> None:
    assert mul({MEAN: 2.0, ONE: 1.0}, {MEAN: 3.0, PW: 5.0}) == {
        MEAN_SQ: 6.0, MEAN: 3.0, PW: 5.0, tuple(sorted([(M1, 1.0), (W, 1.0)])): 10.0}  # fmt: skip
    assert mul({MEAN: 2.0}, {((M1, -1.0),): 3.0}) == {ONE: 6.0}
    assert mul({PW: 1.0}, {PB: 1.0}) == mul({PB: 1.0}, {PW: 1.0}) == {((W, 1.0), (B, 1.0)): 1.0}
    assert mul({MEAN: 1.0}, ZERO) == ZERO


def test_roots_multiply_out_to_what_stands_under_them() -> None:
    std = power(UNDER, 0.5)
    assert mul(std, std) == UNDER == mul(mul(RSTD, power(UNDER, 1.0)), std)
    assert mul(std, RSTD) == {ONE: 1.0}
    assert mul(mul(std, std), mul(std, std)) == pytest.approx({MEAN_4TH: 1.0, SQ_MEAN: 2e-5, ONE: 1e-10})
    assert mul(power(std, 3.0), std) == pytest.approx({MEAN_4TH: 1.0, SQ_MEAN: 2e-5, ONE: 1e-10})
    assert set(mul(RSTD, RSTD)) == {((ROOT, -1.0),)}
    assert mul(mul(std, std), {PW: 2.0}) == {((M2, 1.0), (W, 1.0)): 2.0, PW: 2e-5}
    assert root_poly(ROOT) == UNDER
    assert mul(mul(std, power(VAR, -0.5)), std) == mul(UNDER, power(VAR, -0.5))
    cube = power({((ROOT, 1.5),): 2.0}, 2.0)
    assert cube == {((ROOT, 3.0),): 4.0}  # no norm has it: it stays a root


# -- powers -----------------------------------------------------------------------------------------------------------


def test_a_power_of_one_term() -> None:
    assert power({SQ_MEAN: 4.0}, 0.5) == {((M2, 0.5),): 2.0}
    assert power({MEAN: -2.0}, 2.0) == {MEAN_SQ: 4.0}
    assert power({MEAN: 2.0}, -1.0) == {((M1, -1.0),): 0.5}
    assert power(RSTD, 2.0) == {((ROOT, -1.0),): 1.0}
    assert power(RSTD, -2.0) == UNDER
    assert power({ONE: 0.25}, 0.5) == {ONE: 0.5}
    assert refusal(power, {ONE: -0.5}, 0.5) == "NF105" and power(UNDER, 0.0) != UNDER
    assert power({SQ_MEAN: 0.5, ONE: 1.0}, 2.0**-1)
    assert refusal(power, ZERO, 2.0) == "NF105"
    assert refusal(power, {SQ_MEAN: -4.0}, 0.5) == "NF105"
    assert refusal(power, {MEAN: 1.0}, 0.5) == "NF105"  # sqrt(m1)
    assert refusal(power, {((M1, 2.0),): 1.0}, 0.5) == "NF105"  # |m1| is not m1
    assert refusal(power, {PW: 1.0}, 0.5) == "NF105"
    assert refusal(power, {((M1, 1.0), (M2, 1.0)): 1.0}, 0.5) == "NF105"
    below = power({SQ_MEAN: 1.0, MEAN: 1.0}, -1.0)
    assert refusal(power, below, 0.5) == "NF105"  # what stands under that root may be negative
    assert power(power(VAR, 0.5), 0.5)


def test_a_whole_power_of_a_sum_is_multiplied_out() -> None:
    p = {PW: 1.0, ONE: 1.0}
    square = {((W, 2.0),): 1.0, PW: 2.0, ONE: 1.0}
    assert power(p, 1.0) == p and power(p, 2.0) == square
    assert power(p, 3.0) == mul(square, p) and power(p, 4.0) == mul(square, square)
    assert refusal(power, p, 5.0) == refusal(power, p, 0.5) == refusal(power, p, -1.0) == "NF104"
    assert set(power(UNDER, 5.0)) == {((ROOT, 5.0),)}
    assert power(UNDER, 4.0) == pytest.approx(mul(power(UNDER, 2.0), power(UNDER, 2.0)))
    assert set(power(UNDER, 0.25)) == {((ROOT, 0.25),)}


def test_a_root_is_scaled_so_that_the_mean_square_counts_once() -> None:
    four = {SQ_MEAN: 4.0, ONE: 4e-5}
    assert power(four, -0.5) == {((ROOT, -0.5),): 0.5}
    assert power(four, 0.5) == {((ROOT, 0.5),): 2.0}
    assert power(scale(UNDER, -1.0), -1.0) == {((ROOT, -1.0),): -1.0}
    assert refusal(power, {SQ_MEAN: -1.0, ONE: 1.0}, 0.5) == "NF103"
    ((((atom, _),), _),) = power({MEAN: 3.0, ONE: 2.0}, -1.0).items()  # without a mean square: by the first term
    assert atom[1] == 1 and root_poly(atom) == {MEAN: 1.5, ONE: 1.0}


def test_roots_nest_three_deep_at_most() -> None:
    p = power(UNDER, 0.5)
    for depth in (2, 3):
        p = power(add(p, {ONE: 1.0}), 0.5)
        assert next(iter(p))[0][0][1] == depth
    assert refusal(power, add(p, {ONE: 1.0}), 0.5) == "NF100"
    two = add(power(add(power(UNDER, 0.5), {ONE: 1.0}), 0.5), RSTD)  # roots of depth 2 and 1 side by side
    assert next(iter(power(two, 0.5)))[0][0][1] == 3


# -- what is known of a polynomial ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "low"), [
    ({}, 0.0), ({ONE: 2.0}, 2.0), ({ONE: -2.0}, -2.0), (UNDER, 1e-5), (VAR, 0.0), ({SQ_MEAN: 2.0, MEAN_SQ: -2.0}, 0.0),
    ({SQ_MEAN: 1.0, MEAN_SQ: -1.0 + 1e-3, ONE: 1.0}, 1.0), ({SQ_MEAN: 1.0, MEAN_SQ: -1.01}, None),
    ({SQ_MEAN: 1.0, MEAN_SQ: -1.0 - 1e-8}, 0.0),  # rounding
    ({SQ_MEAN: 0.5, MEAN_SQ: -1.0}, None), ({MEAN_SQ: -1.0}, None), ({MEAN_SQ: 1.0}, 0.0), ({MEAN: 1.0}, None),
    ({SQ_MEAN: -1.0}, None), ({SQ_MEAN: -1.0, ONE: 5.0}, None), ({PW: 1.0}, None), ({((W, 2.0),): 1.0}, 0.0),
    ({((W, 2.0),): -1.0}, None), ({((M2, 2.0),): 1.0, ONE: 3.0}, 3.0), ({((M1, 1.0), (M2, 1.0)): 1.0}, None),
    ({((M1, 2.0), (M2, 1.0)): 1.0}, 0.0), (RSTD, 0.0), (scale(RSTD, -1), None), (power(VAR, 0.5), 0.0),
    (power({SQ_MEAN: 1.0, MEAN: 1.0}, -1.0), None), ({MEAN: 1.0, ONE: 1.0}, None),
    ({ONE: 1.0, MEAN: 1.0, SQ_MEAN: 1.0}, None), ({SQ_MEAN: 2.0, PW: -1.0}, None), ({MEAN_SQ: 0.5}, 0.0),
    ({((M1, 3.0),): 1.0}, None),
    ({((M1, 4.0),): 1.0}, None), ({MEAN_SQ: 1.0, PW: 1.0}, None),
])  # fmt: skip
def test_bound(p: Poly, low: float | None) -> None:
    assert bound(p) == low


def test_what_a_polynomial_holds() -> None:
    both = {((M2, 1.0), (W, 1.0)): 1.0, ONE: 1.0}
    assert free(UNDER) and free(ZERO) and free(RSTD) and not free(both) and not free({ONE: 1.0, PW: 1.0})
    assert has(both, "p") and has(both, "m") and not has(both, "T") and has(RSTD, "T") and not has(RSTD, "m")
    assert not has(ZERO, "p")


@pytest.mark.parametrize(("p", "level"), [
    (ZERO, 0), ({ONE: 1.0, PW: 1.0}, 0), ({MEAN: 1.0}, 1), ({MEAN_SQ: 1.0}, 1), ({SQ_MEAN: 1.0}, 2), (VAR, 2),
    ({((M2, 0.5),): 1.0}, 3), ({((M2, -1.0),): 1.0}, 3), (RSTD, 3), (power(UNDER, 0.5), 3),
    ({((ROOT, 1.0),): 1.0}, 3), ({((ROOT, -1.0),): 1.0}, 3), (power({MEAN: 1.0, ONE: 1.0}, -1.0), 1),
    (power({MEAN: 1.0, ONE: 1.0}, 0.5), 3), ({ONE: 1.0, SQ_MEAN: 1.0, MEAN: 1.0}, 2), ({MEAN: 1.0, PW: 1.0}, 1),
    ({((M1, -1.0),): 1.0}, 1), ({((M2, 1.0), (W, 1.0)): 1.0}, 2),
])  # fmt: skip
def test_how_far_a_value_is_on_the_way(p: Poly, level: int) -> None:
    x = Value("x", (4,), "float32")
    root = Root(x, (0,), 4)
    assert root.key() == (x.index, (0,))
    assert Fact(root, ZERO, ZERO, p, ()).advanced == Fact(root, ZERO, p, ZERO, ()).advanced == level
    assert Fact(root, p, ZERO, ZERO, ()).advanced == (max(level, 2) if p else 0)
    assert Fact(root, p, ZERO, p, ()).linear is bool(p) is Fact(root, ZERO, p, ZERO, ()).linear


# -- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("c", "text"), [
    (0.0, "0"), (999999.0, "999999"), (1e6, "1e+06"), (1234567.0, "1234567"), (0.3, "0.3"),
    (single(1 / 3), "0.33333334"),
    (1e300, "1e+300"), (-2.5, "-2.5"), (1000001.0, "1000001"), (123456.7, "123456.7"), (-1e6, "-1e+06"),
    (1018860544.0, "1.01886054e+09"),
])  # fmt: skip
def test_number(c: float, text: str) -> None:
    assert number(c) == text


def test_single_rounds_and_overflows() -> None:
    assert single(0.1) == 0.10000000149011612 and single(1e300) == math.inf and single(-1e300) == -math.inf


@pytest.mark.parametrize(("p", "text"), [
    (ZERO, "0"), ({ONE: 1.0}, "1"), ({ONE: -1.0}, "-1"), ({MEAN: 1.0}, "mean(x)"), ({MEAN: -2.0}, "-2*mean(x)"),
    (VAR, "var(x)"), ({SQ_MEAN: 2.0, MEAN_SQ: -2.0}, "2*var(x)"), ({MEAN_SQ: -1.0}, "-mean(x)^2"),
    ({SQ_MEAN: 1e6, MEAN_SQ: -1e6 - 1e-4}, "1e+06*var(x)"),
    ({SQ_MEAN: 1.0, MEAN_SQ: -0.5}, "-0.5*mean(x)^2 + mean(x^2)"), ({SQ_MEAN: 1.0}, "mean(x^2)"),
    (UNDER, "mean(x^2) + 1e-05"), ({ONE: -1e-5, SQ_MEAN: 1.0}, "mean(x^2) - 1e-05"),
    ({((W, 2.0), (M2, -1.0)): 3.0}, "3*w^2*mean(x^2)^-1"), (power(UNDER, 0.5), "(mean(x^2) + 1e-05)^1/2"),
    (power(UNDER, 0.25), "(mean(x^2) + 1e-05)^0.25"), ({((M1, 1.0), (ROOT, -0.5)): 1.0},
                                                       "mean(x)*(mean(x^2) + 1e-05)^-1/2"),
    ({tuple(sorted([(W, 1.0), (M1, 1.0), (ROOT, -0.5)])): 1.0}, "w*mean(x)*(mean(x^2) + 1e-05)^-1/2"),
    ({SQ_MEAN: 1e6, MEAN_SQ: -1e6}, "1e+06*var(x)"), ({((M2, -1.5),): 1.0}, "mean(x^2)^-3/2"),
])  # fmt: skip
def test_a_polynomial_as_text(p: Poly, text: str) -> None:
    assert formula_poly(p) == text


@pytest.mark.parametrize(("kappa", "alpha", "beta", "absolute", "text"), [
    (ZERO, {ONE: 1.0}, ZERO, False, "x"), (ZERO, {ONE: -1.0}, ZERO, False, "-x"), (ZERO, ZERO, ZERO, False, "0"),
    (ZERO, {ONE: 1.0}, ZERO, True, "|x|"), ({ONE: 1.0}, {ONE: 2.0}, {ONE: -3.0}, False, "x^2 + 2*x - 3"),
    ({PW: 0.5}, ZERO, {MEAN: 1.0}, False, "0.5*w*x^2 + mean(x)"),
    (ZERO, {ONE: 1.0}, {MEAN: -1.0}, False, "(x - mean(x))"), (ZERO, {ONE: -1.0}, {MEAN: 1.0}, False, "-(x - mean(x))"),
    (ZERO, {ONE: 1.0}, {MEAN: -0.5}, False, "x - 0.5*mean(x)"), (ZERO, {ONE: 1.0}, {MEAN: 1.0}, False, "x + mean(x)"),
    (ZERO, {PW: 2.0}, {((M1, 1.0), (W, 1.0)): -2.0, PB: 1.0}, False, "2*w*(x - mean(x)) + b"),
    (ZERO, {ONE: 1e3}, {MEAN: -1e3 - 1e-2}, False, "1000*x - 1000.01*mean(x)"),
    (ZERO, {ONE: 1e3}, {MEAN: -1e3 - 1e-4}, False, "1000*(x - mean(x))"),
    (ZERO, {ONE: 1e-3}, {MEAN: -1.0001e-3}, False, "0.001*x - 0.0010001*mean(x)"),
])  # fmt: skip
def test_a_fact_as_text(kappa: Poly, alpha: Poly, beta: Poly, absolute: bool, text: str) -> None:
    fact = Fact(Root(Value("x", (4,), "float32"), (0,), 4), kappa, alpha, beta, (), absolute=absolute)
    assert formula(fact) == text
    assert formula(fact, "h") == text.replace("x", "h")


# -- layouts ----------------------------------------------------------------------------------------------------------

X = Value("x", ("B", 5, 64), "float32", index=1)
LAST = Root(X, (2,), 64)
BOTH = Root(X, (1, 2), 320)
SQUARE = Root(Value("s", (64, 64), "float32", index=2), (1,), 64)
WHOLE = ((0,), (1,), (2,))
ROW = ((0,), (1,), ())
S = (-1,)


def leaf(*shape: Any, number: float | None = None, dtype: str = "float32") -> Value:
    return Value("v", None if shape == (None,) else shape, dtype, number, leaf=True, fixed=True, index=9)


@pytest.mark.parametrize(("entry", "d", "fits"), [
    ((2,), 64, True), ((2,), 63, False), ((0,), "B", True), ((0,), "C", False), ((0,), None, False), ((), 1, True),
    ((1, 2), 320, True), ((1, 2), 64, False), ((0, 1), "B", False), ((-1, 2), 64, True), ((0,), 5, False),
])  # fmt: skip
def test_whether_axes_have_a_size(entry: tuple[int, ...], d: Any, fits: bool) -> None:
    assert spans(entry, d, LAST) is fits
    assert identity_layout(leaf(1, 5, 2, 64)) == ((), (1,), (2,), (3,))
    assert not spans((0,), None, Root(Value("u", (None, 4), "float32"), (1,), 4))


@pytest.mark.parametrize(("value", "layout", "root", "aligned"), [
    (leaf(64), WHOLE, LAST, ((2,),)), (leaf(1), WHOLE, LAST, ((),)), (leaf(), WHOLE, LAST, ()),
    (leaf(1, 64), WHOLE, LAST, ((), (2,))), (leaf(1, 1, 64), WHOLE, LAST, ((), (), (2,))),
    (leaf(5, 64), WHOLE, LAST, "NF109"), (leaf(5, 64), WHOLE, BOTH, ((1,), (2,))),
    (leaf(5, 1), WHOLE, BOTH, ((1,), ())),
    (leaf(5, 1), WHOLE, LAST, "NF109"), (leaf("B", 1, 1), WHOLE, LAST, "NF109"), (leaf(32), WHOLE, LAST, "NF108"),
    (leaf("N"), WHOLE, LAST, "NF108"), (leaf(8, 1, 1, 1), WHOLE, LAST, "NF108"), (leaf(1, 1, 1, 1), WHOLE, LAST,
                                                                                 ((), (), (), ())),
    (leaf(None), WHOLE, LAST, "NF115"), (leaf(64), ROW, LAST, ((2,),)), (leaf(32), ROW, LAST, "NF108"),
    (leaf(64), ((0,), ()), LAST, ((2,),)), (leaf(64), ((0,), (1,), S), LAST, (S,)),
    (leaf(3), ((0,), (1,), S), LAST, (S,)),
    (leaf(5, 64, number=2.0), WHOLE, LAST, ((1,), (2,))), (leaf(7, 64, number=2.0), WHOLE, LAST, "NF109"),
    (leaf(7, number=2.0), WHOLE, LAST, "NF108"), (leaf("B", 5, 64, number=2.0), WHOLE, LAST, WHOLE),
    (leaf(5), ((0,), (1,)), LAST, "NF109"), (leaf(64, 1, 1, 1), WHOLE, LAST, "NF108"),
    (leaf(64, 1), ((0,), (1,), (), ()), LAST, ((2,), ())), (leaf(320), ((0,), ()), BOTH, ((1, 2),)),
    (leaf(64), ((),), SQUARE, ((1,),)), (leaf(2), ROW, Root(Value("t", ("B", 5, 2), "float32"), (2,), 2), ((2,),)),
])  # fmt: skip
def test_align(value: Value, layout: Any, root: Root, aligned: Any) -> None:
    if isinstance(aligned, str):
        assert refusal(align, value, layout, root) == aligned
    else:
        assert align(value, layout, root) == aligned


def test_align_takes_the_axis_at_its_own_place_first() -> None:
    """Of two normalised axes of one size, a vector beside the statistics means the last, or the one not there yet."""
    square = Root(Value("u", ("B", 8, 8), "float32"), (1, 2), 64)
    assert align(leaf(8), ((0,), (), ()), square) == ((2,),)
    assert align(leaf(8, 1), ((0,), (), ()), square) == ((1,), ())
    assert align(leaf(8), ((1,), ()), square) == ((2,),)
    assert align(leaf(8, 1), ((), (0,), (), ()), square) == ((1,), ())  # behind an axis more, places say nothing


def test_a_power_beyond_all_numbers() -> None:
    assert refusal(power, {ONE: 1e300}, 4.0) == "NF105"
    assert refusal(power, {((M1, 1e6),): 1.0}, 4.0) == "NF105"


@pytest.mark.parametrize(("a", "b", "both"), [
    (WHOLE, ROW, WHOLE), (ROW, WHOLE, WHOLE), (WHOLE, (), WHOLE), ((), WHOLE, WHOLE), (((2,),), WHOLE, WHOLE),
    (WHOLE, ((2,),), WHOLE), (((1,),), WHOLE, "NF107"), (((0,), ()), WHOLE, "NF107"), ((S,), WHOLE, WHOLE),
    (WHOLE, (S,), WHOLE), ((S,), ((),), (S,)), (((),), (S,), (S,)), ((S,), (S,), (S,)),
    (((0,), (1,), S), ROW, ((0,), (1,), S)), (ROW, ((0,), (1,), S), ((0,), (1,), S)),
])  # fmt: skip
def test_broadcast(a: Any, b: Any, both: Any) -> None:
    assert refusal(broadcast, a, b) == both if isinstance(both, str) else broadcast(a, b) == both


@pytest.mark.parametrize(("layout", "shape", "after"), [
    (WHOLE, ("B", 5, 64), WHOLE), (WHOLE, ("B", 1, 5, 64), ((0,), (), (1,), (2,))),
    (WHOLE, (1, "B", 5, 64), ((), *WHOLE)),
    (WHOLE, ("B", 5, 64, 1), (*WHOLE, ())), (WHOLE, ("n", 64), ((0, 1), (2,))), (WHOLE, ("B", 320), ((0,), (1, 2))),
    (WHOLE, ("n",), ((0, 1, 2),)), (WHOLE, ("B", 320, 1), ((0,), (1, 2), ())), (WHOLE, ("B", 64, 5), "NF106"),
    (WHOLE, ("B", 10, 32), "NF106"), (ROW, ("B", 5), ((0,), (1,))), (ROW, ("n",), ((0, 1),)),
    (ROW, (1, "n"), ((), (0, 1))),
    (((0,), S), ("n",), "NF107"), (ROW, ("B",), "NF106"), ((), (), ()), ((), (1, 1), ((), ())),
    (((0,), (1,), (2,), (3,)), (2, 12, 5), ((0,), (1, 2), (3,))), (((0,), (1,), (2,), (3,)), (6, 20), ((0, 1), (2, 3))),
    (((0,), (1,), (2,), (3,)), (6, 4, 5), ((0, 1), (2,), (3,))), (((0,), (1,), (2,), (3,)), (24, 5), ((0, 1, 2), (3,))),
    (((0,), (1,), (2,), (3,)), (2, 2, 6, 5), "NF106"), (((0,), (1,), (2,), (3,)), (6, 2, 10), "NF106"),
    (((0,), (1,), (2,), (3,)), (6, 1, 20), ((0, 1), (), (2, 3))),
    (WHOLE, ("n", 1), ((0, 1, 2), ())), (WHOLE, (0, 64), ((0, 1), (2,))), (((1,), (2,)), (320, "n"), ((1, 2), ())),
    (((0,), (1,), (2,), (3,), (4,)), (12, 2, 30), ((0, 1), (2,), (3, 4))),
])  # fmt: skip
def test_regroup(layout: Any, shape: Any, after: Any) -> None:
    sizes = {4: (2, 3, 4, 5), 5: (3, 4, 2, 5, 6)}.get(len(layout))
    root = Root(Value("t", sizes, "float32"), (3,), 5) if sizes else LAST
    if isinstance(after, str):
        assert refusal(regroup, layout, shape, root) == after
    else:
        assert regroup(layout, shape, root) == after


# -- rules ------------------------------------------------------------------------------------------------------------


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
    ("expand", {}, x1, None, "NF115"), ("reshape", {}, x1, None, "NF115"),
    ("reshape", {}, x1, ("n", 64), ((0, 1), (2,))),
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


def test_what_an_operator_reads() -> None:
    def norm(compute: str, cast_: str, narrow: str = "") -> Norm:
        return Norm("rms_norm", half, (2,), 64, 1e-5, None, None, compute, cast_, "float16", narrow)

    assert reads_x(norm(F32, "first", F16)) and not reads_x(norm(F32, "first", BF))
    assert reads_x(norm(F16, "none")) and not reads_x(norm(F32, "none"))
    assert not reads_x(norm(F16, "last")) and not reads_x(norm(F32, "last"))


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
