"""The recogniser condition by condition: the roundings of a norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from normfuse.facts import number
from normfuse.graph import Value
from normfuse.recognise import Recognition
from tests.build import Build, codes, rms


def half(spell: Callable[[Build, Value], Sequence[Value]]) -> tuple[Build, list[Value], Recognition]:
    """A norm in float32 of a tensor in float16, and what becomes of it."""
    g = Build(dtype="float16")
    wide = g.op("cast", g.x, dtype="float32")
    made = list(spell(g, rms(g, wide)))
    return g, made, g.found(made[-1])


def described(found: Recognition) -> list[tuple[str, str, str, str]]:
    return [(s.value.name, s.norm.compute, s.norm.cast, s.norm.dtype) for s in found.sites]


def test_the_longest_part_with_roundings_of_an_operator_is_taken() -> None:
    _g, (n, y), found = half(lambda g, n: (c := g.op("cast", n, dtype="float16"), g.op("mul", c, g.w)))
    assert described(found) == [(y.name, "float32", "first", "float16")]
    # a cast to a third type is left outside
    _g, (n, y), found = half(lambda g, n: (c := g.op("cast", n, dtype="float16"), g.op("cast", c, dtype="bfloat16")))
    assert described(found) == [(n.name, "float32", "last", "float16")]


def test_a_factor_that_would_be_rounded_stays_outside() -> None:
    _g, (c, y), found = half(lambda g, n: (c := g.op("cast", n, dtype="float16"),
                                          g.op("mul", c, g.c(3.0, "float16"))))  # fmt: skip
    assert described(found) == [(c.name, "float32", "last", "float16")]
    _g, (c, y), found = half(lambda g, n: (c := g.op("cast", n, dtype="float16"),
                                          g.op("mul", c, g.c(2.0, "float16"))))  # fmt: skip
    assert described(found)[0][0] == y.name
    _g, (_m, y), found = half(lambda g, n: (m := g.op("mul", n, g.c(3.0)), g.op("cast", m, dtype="float16")))
    assert described(found) == [(y.name, "float32", "last", "float16")]


@pytest.mark.parametrize(("factor", "typed", "dtype", "cast"), [
    (3.0, True, "float16", "mixed"), (3.0, False, "float16", "none"),  # a number of Python's is not rounded
    (4.0, True, "float16", "none"), (4096.0, True, "float16", "mixed"), (3.0, True, "float32", "none"),
])  # fmt: skip
def test_an_eps_that_would_be_rounded_is_no_operator_s(factor: float, typed: bool, dtype: str, cast: str) -> None:
    """Of x times a factor, in the layout of x: (factor^2 mean(x^2) + eps) is factor^2 (mean(x^2) + eps / factor^2)."""
    g = Build(dtype=dtype)
    g.graph.typed = typed
    v = g.op("mul", g.op("transpose", g.x, perm=(0, 2, 1), shape=("B", 64, "S")), g.c(factor, dtype))
    m = g.op("mean", g.op("square", v), shape=("B", 1, "S"), axes=(1,), keepdims=True)
    n = g.op("mul", v, g.op("rsqrt", g.op("add", m, g.c(2.0**-10 + 2.0**-20, dtype))))
    found = g.found(g.op("transpose", n, perm=(0, 2, 1), shape=("B", "S", 64)))
    (site,) = found.sites
    assert (site.norm.cast, site.norm.compute) == (cast, "float32" if cast == "mixed" else dtype)
    assert (site.mixed == f"its eps of {number(site.norm.eps)} would be rounded to float16") is (cast == "mixed")


def test_a_part_that_two_norms_have_in_common_is_one_site() -> None:
    """Each is a norm with a weight of its own, up to a factor that would be rounded."""

    def spell(g: Build, n: Value) -> list[Value]:
        c = g.op("cast", n, dtype="float16")
        for weight, factor in ((g.w, 3.0), (g.b, 5.0)):
            g.op("mul", g.op("mul", c, g.c(factor, "float16")), weight).kept = True
        return [c]

    _g, (c,), found = half(spell)
    assert described(found) == [(c.name, "float32", "last", "float16")]


def test_a_part_behind_a_copy_or_between_transposes_is_taken() -> None:
    """Behind it stands a factor that would be rounded."""
    _g, (c, *_), found = half(lambda g, n: (c := g.op("cast", n, dtype="float16"), i := g.op("identity", c),
                                           g.op("mul", i, g.c(3.0, "float16"))))  # fmt: skip
    assert described(found) == [(c.name, "float32", "last", "float16")]
    _g, (c, *_), found = half(lambda g, n: (c := g.op("cast", n, dtype="float16"),
                                           t := g.op("transpose", c, shape=("S", "B", 64), perm=(1, 0, 2)),
                                           m := g.op("mul", t, g.c(3.0, "float16")),
                                           g.op("transpose", m, shape=("B", "S", 64), perm=(1, 0, 2))))  # fmt: skip
    assert described(found) == [(c.name, "float32", "last", "float16")]


def test_a_norm_in_half_precision_with_a_factor_is_mixed() -> None:
    g = Build(dtype="float16")
    y = g.op("mul", rms(g, g.x), g.c(3.0, "float16"))
    (site,) = g.found(y).sites
    assert site.norm.cast in ("none", "mixed") and (site.value is not y or site.norm.cast == "mixed")


def rstd_in(g: Build, dtype: str) -> Value:
    """1/rms of float16, by way of a mean in another type."""
    m = g.op("cast", g.mean(g.op("square", g.x)), dtype=dtype)
    return g.op("cast", g.op("rsqrt", g.op("add", m, g.c(1e-3))), dtype="float16")


def test_statistics_in_another_type_are_mixed_and_say_why() -> None:
    g = Build(dtype="float16")
    r = rstd_in(g, "float32")
    (site,) = g.found(g.op("mul", g.x, r)).sites
    assert (site.norm.cast, site.norm.compute) == ("mixed", "float32")
    assert "float16/float32" in site.mixed


def test_of_the_reasons_for_mixed_roundings_the_one_about_roundings_is_told() -> None:
    g = Build(dtype="float16")
    r = rstd_in(g, "float32")
    (site,) = g.found(g.op("mul", g.op("mul", g.x, g.w), r)).sites
    assert site.norm.cast == "mixed" and "float16/float32" in site.mixed


def test_a_norm_in_two_narrow_types_is_computed_in_float32() -> None:
    g = Build(dtype="float16")
    r = rstd_in(g, "bfloat16")
    (site,) = g.found(g.op("mul", g.x, r)).sites
    assert (site.norm.cast, site.norm.compute) == ("mixed", "float32")


def test_an_unbiased_variance_of_unknown_size_is_told() -> None:
    g = Build(("B", "S", "D"))
    v = g.op("var", g.x, shape=("B", "S", 1), axes=(2,), keepdims=True, correction=1)
    assert codes(g.found(v)) == [("NF110", v.name)]


def test_a_factor_in_float32_is_not_rounded_to_a_narrow_type() -> None:
    g = Build()
    n = g.op("cast", rms(g, g.op("cast", g.x, dtype="float64")), dtype="float32")
    y = g.op("mul", n, g.c(3.0))
    (site,) = g.found(y).sites
    assert (site.value, site.norm.cast, site.norm.weight) == (y, "first", ((3.0, ()),))


def test_a_float64_norm_is_computed_in_float64() -> None:
    g = Build(dtype="float32")
    wide = g.op("cast", g.x, dtype="float64")
    y = g.op("cast", rms(g, wide), dtype="float32")
    (site,) = g.found(y).sites
    assert (site.norm.compute, site.norm.cast, site.norm.x) == ("float64", "last", g.x)


def test_a_sum_of_two_parts_with_other_roundings_is_not_taken_in_part() -> None:
    """cast(x*rstd)*w + x*rstd: the first summand alone is a norm, and the other is the rest of it."""

    def spell(g: Build, n: Value) -> list[Value]:
        wide = g.op("cast", g.op("mul", g.op("cast", n, dtype="float16"), g.w), dtype="float32")
        return [g.op("add", wide, n)]

    _g, (y,), found = half(spell)
    assert [(site.value, site.norm.cast) for site in found.sites] == [(y, "mixed")]


def test_a_sum_of_two_norms_with_other_roundings_is_two() -> None:
    """Each with statistics of its own; of the same roundings it is one."""

    for narrow in (True, False):
        g = Build()
        one, other = g.op("mul", rms(g, g.x), g.w), rms(g, g.x)
        other = g.op("cast", other, dtype="float16") if narrow else other
        y = g.op("add", one, g.op("cast", other, dtype="float32"))
        assert [site.value for site in g.found(y).sites] == ([one, other] if narrow else [y])


def test_of_a_chain_of_roundings_the_longest_part_that_will_do_is_taken() -> None:
    def spell(g: Build, n: Value) -> list[Value]:
        c = g.op("cast", n, dtype="float16")
        a = g.op("mul", c, g.w)
        b = g.op("cast", a, dtype="bfloat16")
        return [a, b, g.op("mul", b, g.c(3.0, "bfloat16"))]

    _g, (a, *_), found = half(spell)
    assert described(found) == [(a.name, "float32", "first", "float16")]
