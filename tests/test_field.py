"""The proof modulo a prime: it holds for every spelling it can compute, and for no other formula."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import pytest

import normfuse
from normfuse import field, verify
from normfuse.config import Config
from normfuse.field import P, Prover, Unsuited, element, fraction, inverse, power, root
from normfuse.frontends.onnx_model import OnnxModel
from normfuse.io.files import read_onnx
from normfuse.norm import Site, match
from tests.near_misses import NEAR_MISSES
from tests.spellings import CANNOT_EXPORT, LOSES_EPS, SPELLINGS
from tests.spelling_files import SINGLE, exported
from tests.share import share

NAMES = [n for n in SPELLINGS if n not in CANNOT_EXPORT["torchscript", 17] and n not in LOSES_EPS["torchscript"]]
UNSUITED = {
    # magnitudes and clamps have no meaning modulo a prime
    "rms_abs_square", "rms_mul_abs_abs", "rms_power_of_magnitude", "ln_abs_centred", "ln_one_pass_clamp",
    "ln_one_pass_maximum", "ln_one_pass_relu", "ln_tf2onnx",
}  # fmt: skip


def sites(path: Path) -> list[Site]:
    return [site for plan in OnnxModel(read_onnx(path)[0], Config(), True).plans for site in plan.found.sites]


def wrong(site: Site) -> Iterator[tuple[str, Site]]:
    """The same region, taken for other norms."""
    norm = site.norm
    other = "rms_norm" if norm.kind == "layer_norm" else "layer_norm"
    yield "kind", replace(site, norm=replace(norm, kind=other))
    yield "eps", replace(site, norm=replace(norm, eps=norm.eps * 2))
    if norm.weight:
        yield "factor", replace(site, norm=replace(norm, weight=tuple((2 * c, f) for c, f in norm.weight)))
        yield "sign", replace(site, norm=replace(norm, weight=tuple((-c, f) for c, f in norm.weight)))
        yield "no weight", replace(site, norm=replace(norm, weight=None))
        squared = tuple((c, tuple((v, 2 * k) for v, k in f)) for c, f in norm.weight)
        if squared != norm.weight:
            yield "weight squared", replace(site, norm=replace(norm, weight=squared))
    if norm.bias:
        yield "no bias", replace(site, norm=replace(norm, bias=None))
        yield "bias", replace(site, norm=replace(norm, bias=tuple((-c, f) for c, f in norm.bias)))
    if norm.x.rank and norm.x.rank > 1 and len(norm.axes) == 1:
        axes = ((norm.axes[0] + 1) % norm.x.rank,)
        if norm.x.shape and norm.x.shape[axes[0]] != norm.size:
            yield "axis", replace(site, norm=replace(norm, axes=axes))


@pytest.mark.parametrize("name", share(NAMES, 2))
def test_every_spelling_is_proved_and_nothing_else(name: str) -> None:
    found = sites(exported("torchscript", 17, SINGLE, name))
    assert found
    for site in found:
        proved = Prover().prove(site)
        assert proved or (proved is None and (name in UNSUITED or "unbiased" in name or "std" in name)), name
        for what, other in wrong(site):
            assert Prover().prove(other) is not True, what
            if proved and what in ("factor", "sign", "bias", "weight squared"):
                assert Prover().prove(other) is False, what


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_never_disproved_where_they_are_norms(name: str, tmp_path: Path) -> None:
    """What the recogniser finds in them is right, and no proof says otherwise."""
    onnx.save(NEAR_MISSES[name].build(), tmp_path / "in.onnx")
    assert all(Prover().prove(site) is not False for site in sites(tmp_path / "in.onnx"))


def test_a_wrong_rule_is_caught_by_the_proof_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the comparison in floats asleep, a norm with another eps is left as it was."""
    monkeypatch.setattr("normfuse.sites.match", lambda fact: replace(found := match(fact), eps=found.eps * 3))
    monkeypatch.setattr("normfuse.frontends.onnx_check.Checker.check", lambda *_: verify.Check(True, same=True))
    source = exported("torchscript", 17, SINGLE, "rms_llama")
    _, report = normfuse.optimize(source)
    assert [r.code for r in report.refusals] == ["NF201"] and "modulo a prime" in report.refusals[0].message
    monkeypatch.setattr(field.Prover, "prove", lambda *_: None)
    assert normfuse.optimize(source)[1].to_dict()["fused"] == 1


def test_the_report_says_what_was_proved() -> None:
    for name, proved in (("rms_llama", True), ("rms_abs_square", False)):
        _, report = normfuse.optimize(exported("torchscript", 17, SINGLE, name))
        assert [(n.verified, n.proved) for n in report.norms] == [(True, proved)]


def test_a_proof_takes_as_long_for_as_many_rows_as_a_row_is_long(tmp_path: Path) -> None:
    """A prompt of 8,192 tokens of size 8,192: the rows are cut down, the size is not."""
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 18]> g (float[8192,8192] x, float[8192] w)
        => (float[8192,8192] y) <int64[1] axis = {-1}> {
            q = Mul(x, x) m = ReduceMean(q, axis) e = Constant<value_float = 1e-6>() v = Add(m, e) s = Sqrt(v)
            n = Div(x, s) y = Mul(n, w) }""")
    onnx.save(model, tmp_path / "in.onnx")
    (site,) = sites(tmp_path / "in.onnx")
    assert Prover().prove(site) is True
    assert [Prover().prove(other) for what, other in wrong(site) if what != "axis"].count(True) == 0


# --- the field ----------------------------------------------------------------------------------------------


def test_small_primes_are_squares() -> None:
    assert P % 4 == 3 and all(P % d for d in range(2, math.isqrt(P) + 1))
    for q in (2, 3, 5, 7, 11, 13, 17, 19, 23):
        assert pow(q, (P - 1) // 2, P) == 1
    for n in (1, 4, 64, 384, 768, 4096, 5120, 11264):
        (r,) = root(np.array([n * n]))
        assert r == n  # the root of a square is the number itself


def test_roots_and_inverses() -> None:
    a = np.random.default_rng(0).integers(1, P, 1000)
    assert (a * inverse(a) % P == 1).all()
    squares = a * a % P
    assert (root(squares) * root(squares) % P == squares).all()
    b = np.roll(squares, 1)
    assert (root(squares * b % P) == root(squares) * root(b) % P).all()
    assert (power(a, 3) == a * a % P * a % P).all()
    with pytest.raises(field.NoSquare):
        root(np.array([P - 1]))
    with pytest.raises(field.NoSquare):
        inverse(np.array([3, 0]))


@pytest.mark.parametrize(("c", "size", "want"), [
    (1e-6, 1, Fraction(1, 10**6)), (float(np.float32(1e-6)), 1, Fraction(1, 10**6)), (1e-5, 1, Fraction(1, 10**5)),
    (1e-12, 1, Fraction(1, 10**12)), (float(np.float32(1 / 384)), 1, Fraction(1, 384)), (-0.5, 1, Fraction(-1, 2)),
    (384 * 1e-6, 1, Fraction(384, 10**6)), (8.000000000000002, 1, Fraction(8)), (1e-4 / 96, 96, Fraction(1, 960_000)),
    (1 / 3, 1, Fraction(1, 3)), (0.0, 1, Fraction(0)),
])  # fmt: skip
def test_constants_that_are_certain(c: float, size: int, want: Fraction) -> None:
    assert fraction(c, size) == want
    assert 0 <= element(want) < P


def test_irrational_constants_are_never_taken_for_fractions() -> None:
    for n in range(2, 20_000):
        if math.isqrt(n) ** 2 != n:
            for c in (n**0.5, n**-0.5):
                for given in (c, float(np.float32(c))):
                    with pytest.raises(Unsuited):
                        fraction(given)
    for c in (math.pi, float("nan"), float("inf"), 0.797884583):
        with pytest.raises(Unsuited):
            fraction(c)
