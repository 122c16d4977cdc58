"""What fuzzing found, each as the smallest graph that shows it; the recogniser alone is on trial, without checks."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import normfuse
from normfuse import Config
from tests.fuzz import onnx_eval
from tests.fuzz.check import judge, session

RMS = "q = Mul({x}, {x}) m = ReduceMean<axes = [-1]>(q) e = Add(m, eps) s = Sqrt(e) {y} = Div({x}, s)"
F32, F16, F64 = "float[2,3,8]", "float16[2,3,8]", "double[2,3,8]"

# name -> (inputs, outputs, body, what the report finds as (kind, axes))
MODELS: dict[str, tuple[str, str, str, list[tuple[str, list[int]]]]] = {
    "the absolute value of a norm is none": (
        F32, F32, RMS.format(x="x", y="n") + " y = Abs(n)", [("rms_norm", [-1])]),
    "an operator on |x| is no norm of x": (
        F32, F32, "a = Abs(x) y = RMSNormalization<epsilon = 0.01>(a, w)", [("rms_norm", [-1])]),
    "|a| times |b| is no square": (
        F32, F32, "mu = ReduceMean<axes = [-1]>(x) c = Sub(x, mu) a = Abs(x) d = Abs(c) q = Mul(a, d)"
        " m = ReduceMean<axes = [-1]>(q) e = Add(m, eps) s = Sqrt(e) y = Div(x, s)", []),
    "the square of the absolute mean": (
        F32, F32, "mu = ReduceMean<axes = [-1]>(x) c = Sub(x, mu) q = Mul(x, x) m = ReduceMean<axes = [-1]>(q)"
        " a = Abs(mu) aa = Mul(a, a) v = Sub(m, aa) e = Add(v, eps) s = Sqrt(e) y = Div(c, s)", [("layer_norm", [-1])]),
    "a mean over an axis of size 1 besides": (
        "float[1,3,8]", "float[1,3,8]", "q = Mul(x, x) m = ReduceMean<axes = [0, 2]>(q) e = Add(m, eps) s = Sqrt(e)"
        " y = Div(x, s)", [("rms_norm", [-1])]),
    "a norm that nothing reads": (
        F32, F32, RMS.format(x="x", y="n") + " dead = Tanh(n) y = Neg(x)", [("rms_norm", [-1])]),
    "own arithmetic behind a norm that is replaced": (
        F16, F16, "h = Cast<to = 1>(x) q = Mul(h, h) m = ReduceMean<axes = [-1]>(q) e = Add(m, eps) s = Sqrt(e)"
        " d = Div(h, s) n = Cast<to = 10>(d) k = Cast<to = 1>(n) q2 = Mul(k, k) m2 = ReduceMean<axes = [-1]>(q2)"
        " e2 = Add(m2, eps) s2 = Sqrt(e2) t = Cast<to = 10>(s2) y = Div(n, t)", [("rms_norm", [-1])] * 2),
    "two norms that are added": (
        F32, F32, "n = LayerNormalization(x, w, b) k = LayerNormalization<epsilon = 0.1>(x, w) y = Add(n, k)",
        [("layer_norm", [-1])] * 2),
    "the mean of a float64 norm is read too": (
        F64, F64, "mu = ReduceMean<axes = [-1]>(x) c = Sub(x, mu) q = Mul(c, c) v = ReduceMean<axes = [-1]>(q)"
        " e = Add(v, eps64) s = Sqrt(e) n = Div(c, s) y = Add(n, mu)", [("layer_norm", [-1])]),
    "the absolute value of the mean is read behind the norm": (
        F32, F32, "mu = ReduceMean<axes = [-1]>(x) c = Sub(x, mu) q = Mul(c, c) v = ReduceMean<axes = [-1]>(q)"
        " e = Add(v, eps) s = Sqrt(e) n = Div(c, s) a = Abs(mu) y = Add(n, a)", [("layer_norm", [-1])]),
    "divided by a float16 weight": (
        F16, F16, "q = Mul(x, x) m = ReduceMean<axes = [-1]>(q) e = Add(m, eps16) s = Sqrt(e) n = Div(x, s)"
        " y = Div(n, w16)", [("rms_norm", [-1])]),
    "a sum of norms whose weight lies along other axes": (
        "float[2,3]", "float[2,3]", "q = Mul(x, x) m = ReduceMean<axes = [0]>(q) e = Add(m, eps) s = Sqrt(e)"
        " n = Div(x, s) k = Mul(n, two_rows) y = Add(k, n)", [("rms_norm", [-2])]),
    "the weight folded into the statistic of a view": (
        F32, F32, "u = Unsqueeze(x, one) q = Mul(u, u) m = ReduceMean<axes = [-1]>(q) e = Add(m, eps) s = Sqrt(e)"
        " r = Reciprocal(s) k = Mul(r, w) n = Mul(u, k) y = Squeeze(n, one)", [("rms_norm", [-1])]),
    "a wider copy of a norm, normalised again": (
        F32, F64, RMS.format(x="x", y="n") + " d = Cast<to = 11>(n) q2 = Mul(d, d) m2 = ReduceMean<axes = [-2]>(q2)"
        " e2 = Add(m2, eps64) s2 = Sqrt(e2) y = Div(d, s2)", [("rms_norm", [-1]), ("rms_norm", [-2])]),
    "what a root is made of is no bias of it": (
        "float[1,1,8]", "float[1,1,8]", "mu = ReduceMean<axes = [-1]>(x) c = Sub(x, mu) q = Mul(c, c)"
        " v = ReduceMean<axes = [-1]>(q) e = Add(v, eps) s = Sqrt(e) n = Div(c, s) y = Add(n, x)",
        [("layer_norm", [-1])]),
    "a view in a branch to sizes from outside": (
        F32 + " x, bool p", F32, "y = If(p) <then_branch = t() => (float[2,3,8] o) { q = Mul(x, x)"
        " m = ReduceMean<axes = [-1], keepdims = 0>(q) r = Reshape(m, kept) e = Add(r, eps) s = Sqrt(e)"
        " o = Div(x, s) }, else_branch = f() => (float[2,3,8] i) { i = Identity(x) }>", [("rms_norm", [-1])]),
    "an operator behind one whose shape only onnx knows": (
        F32, F32, "k = ReduceMax<axes = [-1]>(x) d = Sub(x, k) y = LayerNormalization(d, w)", [("layer_norm", [-1])]),
    "a factor of a power of two between two float16 weights": (
        F16, F16, "q = Mul(x, x) m = ReduceMean<axes = [-1]>(q) e = Add(m, eps16) s = Sqrt(e) n = Div(x, s)"
        " h = Mul(n, half16) y = Mul(h, w16)", [("rms_norm", [-1])]),
    "a dead end inside a norm whose mean is read": (
        F32, F32, "mu = ReduceMean<axes = [-1]>(x) c = Sub(x, mu) dead = Tanh(c) q = Mul(c, c)"
        " v = ReduceMean<axes = [-1]>(q) e = Add(v, eps) s = Sqrt(e) n = Div(c, s) y = Add(n, mu)",
        [("layer_norm", [-1])]),
    "the deviation of a norm of a sum is read": (
        F32, F32, "t = Tanh(x) s = Add(x, t) n, mu, r = LayerNormalization(s, w) y = Add(n, r)",
        [("layer_norm", [-1])]),
    "the residual of a norm over all axes is no bias": (
        "float[3,8]", "float[3,8]", "m0 = ReduceMean<axes = [0, 1]>(x) k = Sub(x, m0) q = Mul(k, k)"
        " m = ReduceMean<axes = [0, 1]>(q) e = Add(m, eps) s = Sqrt(e) n = Div(k, s) t = Tanh(n)"
        " m1 = ReduceMean<axes = [0, 1]>(t) c = Sub(t, m1) q1 = Mul(c, c) v = ReduceMean<axes = [0, 1]>(q1)"
        " e1 = Add(v, eps) s1 = Sqrt(e1) n1 = Div(c, s1) y = Add(n1, x)",
        [("layer_norm", [-2, -1])] * 2),
    "a copy of x as the residual": (
        F32, F32, "i = Identity(x) mu = ReduceMean<axes = [-1]>(i) c = Sub(i, mu) q = Mul(c, c)"
        " v = ReduceMean<axes = [-1]>(q) e = Add(v, eps) s = Sqrt(e) n = Div(c, s) y = Add(n, i)",
        [("layer_norm", [-1])]),
    "norms that cancel": (
        F32, F32, RMS.format(x="x", y="n") + " m_ = Neg(n) k = Add(m_, b) t = Transpose<perm = [0, 1, 2]>(n)"
        " y = Add(t, k)", [("rms_norm", [-1])]),
    "two norms that cancel": (
        F32, F32, RMS.format(x="x", y="n") + " q2 = Mul(x, x) m2 = ReduceMean<axes = [-1]>(q2) e2 = Add(m2, eps)"
        " s2 = Sqrt(e2) j = Div(x, s2) m_ = Neg(j) k = Add(m_, b) y = Add(n, k)", [("rms_norm", [-1])] * 2),
    "a norm in a wider type behind a view": (
        F32, F32, "t = Transpose<perm = [0, 1, 2]>(x) d = Cast<to = 11>(t)"
        " n = RMSNormalization<stash_type = 11>(d, w64) y = Cast<to = 1>(n)", [("rms_norm", [-1])]),
}  # fmt: skip
def model(name: str) -> onnx.ModelProto:
    inputs, outputs, body, _ = MODELS[name]
    given = inputs if " x" in inputs else f"{inputs} x"
    opset, version = (23, 11) if "RMSNorm" in body else (17, 8)
    text = f'<ir_version: {version}, opset_import: ["" : {opset}]> g ({given}) => ({outputs} y) {{ {body} }}'
    made = onnx.parser.parse_model(text)
    w = np.linspace(0.5, 1.5, 8)
    constants: dict[str, Any] = {
        "w": w.astype("f4"), "b": w.astype("f4"), "w64": w, "w16": w.astype("f2"), "eps": np.float32(0.01),
        "two_rows": np.array([[0.5], [2.0]], "f4"),
        "eps16": np.float16(0.01), "eps64": np.float64(0.01), "half16": np.float16(-0.5),
        "one": np.array([1]), "kept": np.array([2, 3, 1]),
    }  # fmt: skip
    used = set(re.findall(r"\w+", body))
    tensors = (onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items() if n in used)
    made.graph.initializer.extend(tensors)
    return made


@pytest.mark.parametrize("target", ["onnx", "normfuse", "ort-cpu"])
@pytest.mark.parametrize("name", MODELS)
def test_found_by_fuzzing(name: str, target: Any) -> None:
    version = "1.31" if target == "ort-cpu" else ""
    before, config = model(name), Config(target=target, verify="off", ort_version=version)
    after, report = normfuse.optimize(before, config)
    assert [(n.kind, n.axes) for n in report.norms] == MODELS[name][3]
    if name == "a norm in a wider type behind a view" and target != "normfuse":
        assert report.norms[0].action == "kept"
    if target == "normfuse" and name == "two norms that are added":
        assert sum("norm_add" in n.emitted for n in report.norms) == 1
    if name == "the residual of a norm over all axes is no bias":
        assert report.norms[-1].bias is None
    onnx.checker.check_model(after, full_check=True)
    shape = [d.dim_value for d in before.graph.input[0].type.tensor_type.shape.dim]
    for scale in (1.0, 1e-3, 0.0):
        feeds = {"x": scale * np.random.default_rng(0).standard_normal(shape), "p": np.array(True)}
        want, got = (onnx_eval.Model(m).run(feeds)[0] for m in (before, after))
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * max(np.abs(want).max(), 1e-3))
    again, _ = normfuse.optimize(after, config)
    assert again.SerializeToString(deterministic=True) == after.SerializeToString(deterministic=True)


@pytest.mark.parametrize(("kind", "number"), [("float16", 10), ("double", 11)])
def test_onnx_runtime_takes_the_eps_of_a_function_in_other_types(kind: str, number: int) -> None:
    """Its own fusion reads eps as float32 only, and takes 1e-5 for others; it must not see its pattern."""
    text = f"""<ir_version: 8, opset_import: ["" : 17]> g ({kind}[2,3,8] x) => ({kind}[2,3,8] y) {{
        f = Constant<value = float {{0.05}}>() c = Cast<to = {number}>(f) q = Mul(x, x) m = ReduceMean<axes = [-1]>(q)
        e = Add(m, c) s = Sqrt(e) n = Div(x, s) y = Mul(n, w) }}"""
    dtype = np.float16 if kind == "float16" else np.float64
    before = onnx.parser.parse_model(text)
    before.graph.initializer.append(onnx.numpy_helper.from_array(np.linspace(0.5, 1.5, 8).astype(dtype), "w"))
    after, report = normfuse.optimize(before, Config(verify="off"))
    assert report.fused == 1
    feeds = {"x": (1e-2 * np.random.default_rng(0).standard_normal((2, 3, 8))).astype(dtype)}
    want, got = (session(m).run(None, feeds)[0] for m in (before, after))
    np.testing.assert_allclose(got, want, rtol=5e-3 if kind == "float16" else 1e-6)


def test_a_norm_is_added_to_a_copy_of_what_it_reads() -> None:
    _, report = normfuse.optimize(model("a copy of x as the residual"), Config(target="normfuse"))
    assert [(n.action, n.verified) for n in report.norms] == [("fused", True)]
    assert "norm_add" in report.norms[0].emitted


@pytest.mark.parametrize("kind", ["float", "float16", "bfloat16", "double"])
def test_an_eps_in_the_type_of_x_is_rounded_in_the_check_too(kind: str) -> None:
    text = ('<ir_version: 10, opset_import: ["" : 23]> g (KIND[2,64] x, KIND[64] w) => (KIND[2,64] y)'
            " <float c = {1e-5}, int64[1] last = {-1}> { eps = CastLike(c, x) q = Mul(x, x) m = ReduceMean(q, last)"
            " e = Add(m, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, w) }")  # fmt: skip
    _, report = normfuse.optimize(onnx.parser.parse_model(text.replace("KIND", kind)))
    assert [(n.action, n.verified) for n in report.norms] == [("fused", True)]


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize(("kind", "unseen"), [("double", True), ("float16", False)])
def test_a_layernorm_behind_a_cast_from_float64_runs(kind: str, unseen: bool, opset: int) -> None:
    """ONNX Runtime takes the Cast into a LayerNormalization of mixed types, and then has no kernel."""
    text = f"""<ir_version: 8, opset_import: ["" : {opset}]> g ({kind}[2,3,8] a) => (float[2,3,8] y) {{
        x = Cast<to = 1>(a) mu = ReduceMean<axes = [-1]>(x) c = Sub(x, mu) q = Mul(c, c) v = ReduceMean<axes = [-1]>(q)
        e = Add(v, eps) s = Sqrt(e) n = Div(c, s) z = Mul(n, w) y = Add(z, b) }}"""
    before, w = onnx.parser.parse_model(text), np.linspace(0.5, 1.5, 8).astype("f4")
    tensors = {"w": w, "b": w, "eps": np.float32(0.01)}
    before.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in tensors.items())
    after, report = normfuse.optimize(before)
    assert report.fused == 1
    assert any("unseen" in n.op_type for n in after.graph.node) == (unseen and opset == 13)
    feeds = {"a": np.random.default_rng(0).standard_normal((2, 3, 8)).astype("f8" if unseen else "f2")}
    want, got = (session(m).run(None, feeds)[0] for m in (before, after))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def _joined(x: Tensor, w: Tensor) -> Tensor:
    h = x.reshape(2, 24)
    n = h * torch.rsqrt((h * h).mean(-1, keepdim=True) + 0.01) * w
    return n.reshape(2, 4, 6)


def _wide_bias(x: Tensor, w: Tensor) -> Tensor:
    h = x.unsqueeze(1)
    n = h * torch.rsqrt((h * h).mean(-1, keepdim=True) + 0.01) + w[:6].reshape(1, 1, 1, 6)
    return n.squeeze(1)


def _sum_of_parts(x: Tensor, w: Tensor) -> Tensor:
    n = F.layer_norm(x, (6,), None, None, 0.01)
    s = n + n * w[:6]  # a norm, not a residual addition
    return F.layer_norm(s, (6,), None, None, 0.1)


def _deviation_read(x: Tensor, w: Tensor) -> Tensor:
    y, _, rstd = torch.native_layer_norm(x + x * w[:6], [6], w[6:12], None, 0.01)  # a sum and its norm in one
    return y + rstd  # ... would leave the operator there for rstd


@pytest.mark.parametrize("function", [_joined, _wide_bias, _sum_of_parts, _deviation_read])
def test_found_by_fuzzing_in_torch(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, w = torch.randn(2, 4, 6), torch.nn.Parameter(torch.randn(24))
    program = torch.export.export(_Module(function, w), (x,))
    after, report = normfuse.optimize(program, Config(verify="off"))
    assert str(normfuse.optimize(after, Config(verify="off"))[0].graph) == str(after.graph)
    assert report.norms and all(n.action in ("fused", "kept") for n in report.norms)
    with torch.no_grad():
        torch.testing.assert_close(after.module()(x), function(x, w), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("over", "sums"), [((2, 4, 6), 0), ((4, 6), 1)])
def test_a_constant_added_to_a_norm_is_its_bias_or_a_table(over: tuple[int, ...], sums: int) -> None:
    """A bias of all axes belongs to the norm before it, and a table of positions to the norm behind it."""

    def function(x: Tensor, w: Tensor) -> Tensor:
        n = F.layer_norm(x.double(), over, None, None, 0.01).mul(0.99).float()
        return F.layer_norm(n + w, (6,), None, None, 0.1)

    x, w = torch.randn(2, 4, 6), torch.nn.Parameter(torch.randn(2, 4, 6))
    after, report = normfuse.optimize(torch.export.export(_Module(function, w), (x,)))
    assert [n.emitted for n in report.norms].count("normfuse.add_layer_norm") == sums
    assert str(normfuse.optimize(after)[0].graph) == str(after.graph)
    with torch.no_grad():
        torch.testing.assert_close(after.module()(x), function(x, w), rtol=1e-5, atol=1e-5)


class _Module(torch.nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], w: torch.nn.Parameter) -> None:
        super().__init__()
        self.function, self.w = function, w

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w)


FX_SEEDS = (100016613, 200006769, 500057939, 700001347, 700024285, 700054430, 800017229, 800025810, 800030158,
            900009894, 2000011842)  # fmt: skip


@pytest.mark.parametrize("seed", [
    100001559, 100008095, 100010238, 100010411, 100018377, 200003933, 200016335, 300023312, 300043230, 300057802,
    500021427, 500048047, 500050577, 500063205, 500066786, 500068188, 500078911, 950025201,
    1700000576, 1800001980, 1900002801,
    *FX_SEEDS,
])  # fmt: skip
def test_graphs_that_failed_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.program.LATER", 0.3 if seed > 10**9 else 0.0)
    assert not judge(seed, "fx" if seed in FX_SEEDS else "onnx").failures
