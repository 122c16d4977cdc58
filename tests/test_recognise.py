"""The recogniser on graphs written by hand: what fact each value gets, and which of them are norms."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import pytest

from normfuse.facts import formula, number
from normfuse.graph import Graph, Value
from normfuse.recognise import Recognition, recognise
from tests.build import Build


def facts(found: Recognition) -> list[str]:
    return [formula(site.fact) for site in found.sites]


def test_rms_norm_and_its_steps_print_as_formulas() -> None:
    g = Build()
    square = g.op("square", g.x)
    mean = g.mean(square)
    rstd = g.op("rsqrt", g.op("add", mean, g.c(1e-6)))
    y = g.op("mul", g.w, g.op("mul", g.x, rstd))
    found = g.found(y)
    assert facts(found) == ["w*x*(mean(x^2) + 1e-06)^-1/2"]
    describe = {name: formula(next(f for f in found.facts[v.index].values() if f.root.value is g.x))
                for name, v in {"square": square, "mean": mean, "rstd": rstd}.items()}  # fmt: skip
    assert describe == {"square": "x^2", "mean": "mean(x^2)", "rstd": "(mean(x^2) + 1e-06)^-1/2"}
    assert found.describe(g.w) == "w"


def two_pass(g: Build) -> Value:
    c = g.op("sub", g.x, g.mean(g.x))
    return g.op("mul", c, g.rstd(c))


def one_pass(g: Build) -> Value:
    mean = g.mean(g.x)
    var = g.op("sub", g.mean(g.op("square", g.x)), g.op("square", mean))
    var = g.op("max", var, g.c(0.0))
    return g.op("div", g.op("sub", g.x, mean), g.op("sqrt", g.op("add", var, g.c(1e-5))))


def reversed_difference(g: Build) -> Value:
    c = g.op("sub", g.mean(g.x), g.x)
    return g.op("neg", g.op("mul", c, g.rstd(c)))


def shift_last(g: Build) -> Value:
    mean = g.mean(g.x)
    rstd = g.rstd(g.op("sub", g.x, mean))
    return g.op("sub", g.op("mul", g.x, rstd), g.op("mul", mean, rstd))


def rms_of_centred(g: Build) -> Value:
    c = g.op("sub", g.x, g.mean(g.x))
    return g.op("rms_norm", c, axes=(2,), eps=1e-5)


@pytest.mark.parametrize("spell", [two_pass, one_pass, reversed_difference, shift_last, rms_of_centred])
def test_layer_norm_has_one_fact(spell: Callable[[Build], Value]) -> None:
    g = Build()
    y = g.op("add", g.op("mul", spell(g), g.w), g.b)
    found = g.found(y)
    assert facts(found) == ["w*(x - mean(x))*(var(x) + 1e-05)^-1/2 + b"]
    assert found.sites[0].norm.kind == "layer_norm" and not found.refusals


def test_sum_with_n_times_eps_is_the_same_norm() -> None:
    g = Build()
    total = g.mean(g.op("square", g.x), kind="sum")
    y = g.op("mul", g.x, g.op("rsqrt", g.op("add", total, g.c(64e-6))))
    found = g.found(y)
    assert facts(found) == ["0.125*x*(mean(x^2) + 1e-06)^-1/2"]
    assert found.sites[0].norm.weight == ((0.125, ()),)


def test_unbiased_variance_is_a_norm_with_another_scale_and_eps() -> None:
    g = Build()
    var = g.op("var", g.x, shape=("B", "S", 1), axes=(2,), keepdims=True, correction=1)
    y = g.op("div", g.op("sub", g.x, g.mean(g.x)), g.op("sqrt", g.op("add", var, g.c(1e-5))))
    norm = g.found(y).sites[0].norm
    assert norm.kind == "layer_norm" and norm.eps == pytest.approx(1e-5 * 63 / 64)
    assert norm.weight is not None and norm.weight[0][0] == pytest.approx((63 / 64) ** 0.5)


def test_two_norms_may_share_a_mean() -> None:
    g = Build()
    c = g.op("sub", g.x, g.mean(g.x))
    n = g.op("mul", c, g.rstd(c))
    found = g.found(g.op("mul", n, g.w), g.op("mul", n, g.b))
    assert facts(found) == ["w*(x - mean(x))*(var(x) + 1e-05)^-1/2", "b*(x - mean(x))*(var(x) + 1e-05)^-1/2"]


def test_a_norm_of_a_norm_is_two() -> None:
    g = Build()
    first = g.op("mul", g.x, g.rstd(g.x))
    second = g.op("mul", first, g.rstd(first))
    found = g.found(second)
    assert [site.norm.x.name for site in found.sites] == ["x", first.name]


def test_keepdims_0_on_a_square_tensor_is_refused() -> None:
    g = Build((64, 64))
    mean = g.mean(g.op("square", g.x), (1,), keepdims=False)
    y = g.op("mul", g.x, g.op("rsqrt", g.op("add", mean, g.c(1e-5))))
    found = g.found(y)
    assert not found.sites and [r.code for r in found.refusals] == ["NF107"]


@pytest.mark.parametrize(("spoil", "code"), [
    (lambda g, m: g.op("rsqrt", m), "NF103"),
    (lambda g, m: g.op("rsqrt", g.op("add", m, g.c(-1e-5))), "NF103"),
    (lambda g, m: g.op("rsqrt", g.op("add", m, g.w)), "NF104"),
    (lambda g, m: g.op("reciprocal", g.op("add", g.op("sqrt", m), g.c(1e-5))), "NF101"),
    (lambda g, m: g.op("reciprocal", g.op("add", m, g.c(1e-5))), "NF105"),
    (lambda g, m: g.op("rsqrt", g.op("max", m, g.c(1e-5))), "NF119"),
])  # fmt: skip
def test_what_is_nearly_a_norm_says_what_is_missing(spoil: Callable[[Build, Value], Value], code: str) -> None:
    g = Build()
    found = g.found(g.op("mul", g.x, spoil(g, g.mean(g.op("square", g.x)))))
    assert not found.sites and [r.code for r in found.refusals] == [code]


def test_statistics_of_another_tensor_are_refused() -> None:
    g = Build()
    z = g.graph.leaf("z", ("B", "S", 64), "float32")
    found = g.found(g.op("mul", z, g.rstd(g.x)))
    assert not found.sites and [r.code for r in found.refusals] == ["NF106"]


@pytest.mark.parametrize(("back", "weight", "cast"), [
    (True, False, "first"), (False, True, "last"), (False, False, "none"),
])  # fmt: skip
def test_the_order_of_casts_is_part_of_the_norm(back: bool, weight: bool, cast: str) -> None:
    g = Build(dtype="float16")
    wide = g.op("cast", g.x, dtype="float32")
    n = g.op("mul", wide, g.rstd(wide))
    w32 = g.op("cast", g.w, dtype="float32")
    if back:
        y = g.op("mul", g.op("cast", n, dtype="float16"), g.w)
    else:
        y = g.op("mul", n, w32)
        y = g.op("cast", y, dtype="float16") if weight else y
    norm = g.found(y).sites[0].norm
    assert (norm.compute, norm.cast) == ("float32", cast)


def test_a_rounding_that_is_widened_again_stays() -> None:
    g = Build(dtype="float16")
    wide = g.op("cast", g.x, dtype="float32")
    n = g.op("mul", wide, g.rstd(wide))
    y = g.op("cast", g.op("cast", n, dtype="float16"), dtype="float32")
    site = g.found(y).sites[0]
    assert site.value.dtype == "float16" and site.norm.cast == "last"  # the second cast is left as it is
    g = Build(dtype="float16")
    again = g.op("cast", g.op("cast", g.x, dtype="float32"), dtype="float16")  # rounds nothing
    assert g.found(g.op("mul", again, g.rstd(again))).sites[0].norm.x is g.x


def test_squares_in_half_before_the_cast_have_no_operator() -> None:
    g = Build(dtype="float16")
    mean = g.mean(g.op("cast", g.op("square", g.x), dtype="float32"))
    rstd = g.op("rsqrt", g.op("add", mean, g.c(1e-5)))
    y = g.op("cast", g.op("mul", g.op("cast", g.x, dtype="float32"), rstd), dtype="float16")
    site = g.found(y).sites[0]
    assert site.norm.cast == "mixed" and "float16/float32" in site.mixed


def chain(blocks: int) -> Graph:
    g = Build()
    value = g.x
    for _ in range(blocks):
        y = g.op("mul", g.w, g.op("mul", value, g.rstd(value)))
        value = g.op("add", value, g.op("opaque", y))
    value.kept = True
    return g.graph


def test_time_is_linear_in_the_graph() -> None:
    def seconds(blocks: int) -> float:
        best = float("inf")
        for _ in range(3):
            graph = chain(blocks)
            started = time.perf_counter()
            assert len(recognise(graph).sites) == blocks
            best = min(best, time.perf_counter() - started)
        return best

    gc.disable()  # its full collections grow with all that other tests keep
    try:
        assert seconds(1600) < 16 * seconds(100) * 3  # a quadratic pass would take 16 times that again
    finally:
        gc.enable()


def test_a_long_chain_of_norms_and_scalings_stays_linear() -> None:
    g = Build()
    value = g.x
    for _ in range(800):
        value = g.op("mul", g.op("mul", value, g.rstd(value)), g.c(1.5))
    started = time.perf_counter()
    assert len(g.found(value).sites) == 800
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize(("value", "text"), [
    (9.999999974752427e-07, "1e-06"), (0.1, "0.1"), (64.0, "64"), (1e-12, "1e-12"), (-0.5, "-0.5"), (1e30, "1e+30"),
])  # fmt: skip
def test_numbers_print_as_short_as_float32_allows(value: float, text: str) -> None:
    assert number(value) == text


def test_a_norm_of_a_copy_of_a_norm_is_found() -> None:
    g = Build()

    def norm(x: Value) -> Value:
        return g.op("mul", g.op("layer_norm", x, axes=(2,), eps=1e-5), g.w)

    copy = g.op("identity", norm(g.x))
    second = norm(copy)
    total = g.op("add", copy, second)
    assert len(g.found(total).sites) == 2


def test_a_copy_behind_a_norm_does_not_name_it() -> None:
    """Exporters put copies and views of a model's results behind its last module."""
    g = Build()
    y = g.op("mul", g.w, g.op("mul", g.x, g.rstd(g.x)))
    copy = g.op("reshape", g.op("identity", y), shape=("B", "S", 64))
    (site,) = g.found(copy).sites
    assert site.label == y.name
