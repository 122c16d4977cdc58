"""LayerNorm to RMSNorm where the certificate, which draws every constant at random, has to leave some as they are, and
to know what the numbers were that a rewrite rounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.test_conversion_traps import D, check, model, numbers

IDS = [{"i": np.array([[0, 3, 1]])}]
OPERATOR = "{1} = LayerNormalization<axis=-1>({0}, g, b)"
SPELLED = """{1}m = {mean} {1}d = Sub({0}, {1}m) {1}q = Mul({1}d, {1}d) {1}v = {var} {1}e = Add({1}v, eps)
{1}r = Sqrt({1}e) {1}n = Div({1}d, {1}r) {1}w = Mul({1}n, g) {1} = Add({1}w, b)"""
HELD: dict[str, Any] = {"table": numbers(9, D), "w": numbers(D, D)}


def chain(norm: str) -> str:
    """h + f(norm(h)), and the norm n of that."""
    return f"h = Gather(table, i) {norm.format('h', 'k')} f = MatMul(k, w) h1 = Add(h, f) {norm.format('h1', 'n')}"


@pytest.mark.parametrize("opset", [13, 18, 23])
@pytest.mark.parametrize(("behind", "by"), [
    ("Div(n, by)", 8**0.5), ("Mul(n, by)", 3.0), ("Div(n, by)", np.full(D, 3)), ("Div(minus, by)", 7.0),
])  # fmt: skip
def test_a_norm_divided_by_a_number_without_an_inverse(behind: str, by: Any, opset: int) -> None:
    spelled = SPELLED.replace("{mean}", "ReduceMean<axes=[-1]>({0})").replace("{var}", "ReduceMean<axes=[-1]>({1}q)")
    lines = f"{chain(spelled if opset == 13 else OPERATOR)} minus = Neg(n) y = {behind}"
    made = model("int64[1,3] i", lines, opset=opset, by=np.asarray(by, np.float32), **HELD)
    check(made, IDS, 2, verify="sites")


@pytest.mark.parametrize("weight", ["zero", "t"])
def test_a_branch_that_starts_at_zero(weight: str) -> None:
    turned = "t = Transpose(zero)" if weight == "t" else ""
    lines = f"{chain(OPERATOR)} {OPERATOR.format('h1', 'n1')} {turned} z = MatMul(n1, {weight}) y = Add(n, z)"
    check(model("int64[1,3] i", lines, zero=np.zeros((D, D), np.float32), **HELD), IDS, 3, verify="sites")


@pytest.mark.parametrize("verify", ["off", "sites"])
@pytest.mark.parametrize("copy", ["Identity(ones)", "Transpose(ones)", "Identity(turned)"])
def test_means_by_a_matrix_of_ones(copy: str, verify: str) -> None:
    read = "ones" if copy == "Identity(ones)" else "copy"  # an exporter shares equal constants through Identity
    norm = SPELLED.replace("{mean}", f"MatMul({{0}}, {read})").replace("{var}", "MatMul({1}q, copy)")
    lines = f"turned = Transpose(ones) copy = {copy} {chain(norm)} y = Neg(n)"
    ones = np.full((D, 1) if read == "ones" else (1, D), 1 / D, np.float32)
    check(model("int64[1,3] i", lines, ones=ones, **HELD), IDS, 2, verify=verify)


@pytest.mark.parametrize("verify", ["off", "sites"])
@pytest.mark.parametrize("op", ["InstanceNormalization(c, ones, zeros)", "InstanceNormalization(c, same, zeros)"])
def test_an_instance_normalization_of_rows(op: str, verify: str) -> None:
    norm = f"{{1}}n = {op.replace('(c', '({0}')} {{1}}m = Mul({{1}}n, g) {{1}} = Add({{1}}m, b)"
    held = HELD | {"ones": np.ones(3, np.float32), "zeros": np.zeros(3, np.float32)}
    check(model("int64[1,3] i", f"same = Identity(ones) {chain(norm)} y = Neg(n)", **held), IDS, 2, verify=verify)
