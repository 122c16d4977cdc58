"""The algebra law by law: what each function of `facts` gives, and where exactly it refuses."""

from __future__ import annotations

import math

import pytest

from normfuse.facts import (
    M1, M2, MAX_TERMS, MEAN, MEAN_SQ, ONE, SQ_MEAN, ZERO, Fact, Poly, Root, add, bound, constant, formula,
    formula_poly, free, has, mul, number, power, root_poly, scale, single,
)  # fmt: skip
from normfuse.graph import Value
from tests.algebra import B, MEAN_4TH, PB, PW, ROOT, RSTD, UNDER, VAR, W, refusal

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
