"""The certificate of a conversion in the branches of an If: each taken in turn, and what becomes of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import normfuse
from normfuse.convert import Certificate, joined
from normfuse.folding import Folder
from normfuse.sessions import session
from tests.branches import ALONE, EXACT, HELD, NORM, ROWS, branches, hide, made
from tests.converted import RNG, D, check, flags, model, numbers


@pytest.mark.parametrize("branch", [0, 1])
def test_leaving_out_an_edit_of_either_fails_the_certificate(branch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    own = [NORM.format("o"), NORM.format("o").replace("w)", "u)")]
    one = made(*own, u=numbers(4, D))
    run = Folder.run

    def without(self: Folder, *args: Any) -> None:
        run(self, *args)
        for left in [v for v in self.plan.edits if v.name == "wu"[branch]]:
            del self.plan.edits[left]

    assert normfuse.optimize(one, EXACT)[1].converted == 2
    monkeypatch.setattr(Folder, "run", without)
    report = normfuse.optimize(one, EXACT)[1]
    assert report.converted == 0 and [r.code for r in report.refusals] == ["NF304"] * 2
    assert all("differ" in r.message for r in report.refusals)


@pytest.mark.parametrize("branch", [0, 1])
def test_a_bias_goes_into_the_layer_behind_it_in_a_branch(branch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where it is lost, behind a softmax that does not see it, the certificate does."""
    layer = NORM.format("f") + " a = Add(f, c) o = Softmax(a)"
    texts = [layer, "o = MatMul(x, u)"]
    one = made(*(texts if branch == 0 else texts[::-1]), c=numbers(5), u=numbers(4, 5))
    report = check(one, flags(ROWS), 1, verify="sites")
    assert any("into the linear layers" in note for note in report.notes)
    monkeypatch.setattr("normfuse.convert.Edits.add_product", lambda *args: None)
    report = normfuse.optimize(one, EXACT)[1]
    assert report.converted == 0 and [r.code for r in report.refusals] == ["NF304"]


def test_what_the_main_graph_computes_for_a_branch() -> None:
    """With the other branch taken nothing sees the edit. A branch has the name that an operator would get."""
    one = made("n = LayerNormalization<axis=-1>(h, g, b) o = MatMul(n, k)", "o = MatMul(x, u)", "h = MatMul(x, w)",
               u=numbers(4, 5))  # fmt: skip
    check(one, flags(ROWS), 1, verify="sites")
    stacked = """n = LayerNormalization<axis=-1>(h, g, b) h_centred = Add(h, n)
                 l = LayerNormalization<axis=-1>(h, b, g) s = Add(h_centred, l) o = MatMul(s, k)"""
    one = made(stacked, "o = MatMul(x, u)", "i = MatMul(x, w) h = Relu(i)", u=numbers(4, 5))
    report = check(one, flags(ROWS), 2)
    assert {n.conversion["verdict"] for n in report.norms} == {"exact with an operator"}


QUANTISED = "q = QuantizeLinear(x, scale, zero) d = DequantizeLinear(q, scale, zero) o = MatMul(d, u)"
@pytest.mark.parametrize(("lines", "outputs", "code"), [
    (branches(NORM.format("o"), QUANTISED), "float[] y", "NF305"),
    (branches(NORM.format("o"), "o = Unsqueeze(x, last)") + """ other = Not(flag) z = If (other) <
        then_branch = t2 () => (float[] p) { p = Squeeze(y, last) },
        else_branch = e2 () => (float[] p) { p = Neg(x) }>""", "float[] z", "NF304")])
def test_a_branch_is_not_in_the_way_of_the_rest(lines: str, outputs: str, code: str) -> None:
    """One that is quantised, and two that are never taken together, which no certificate can run."""
    held: dict[str, Any] = {"wm": numbers(4, D), "u": numbers(4, 5), "scale": np.float32(0.1), "zero": np.uint8(3)}
    one = model("float[B,T,4] x, bool flag", f"{ALONE} {lines}", f"float[] r, {outputs}", **HELD | held, last=[-1])
    report = check(one, flags(ROWS), 1, verify="off" if code == "NF305" else "sites")
    assert [(n.conversion or {})["code"] for n in report.norms] == ["", code]


def test_constants_of_a_branch_keep_their_names() -> None:
    """Those of the model that is given, whose tensors the certificate reads."""
    text = "h = MatMul(x, w) n = LayerNormalization<axis=-1>(h, g, b) j = Add(n, eps) {0} = MatMul(j, k)"
    one = made(text.format("o"), "o = MatMul(x, u)", u=numbers(4, 5))
    del one.graph.initializer[[i.name for i in one.graph.initializer].index("eps")]
    hide(one, 0, eps=np.array(1e-5, np.float32))
    before = one.SerializeToString()
    for _ in range(2):
        check(one, flags(ROWS), 1, verify="sites")
        assert one.SerializeToString() == before


def test_a_branch_that_gives_a_constant() -> None:
    one = hide(made(NORM.format("o"), "q = Neg(x)"), 1, o=numbers(2, 3, 5))
    for verify in ("off", "sites"):
        check(one, flags(ROWS), 1, verify=verify)


@pytest.mark.parametrize("inner", [False, True])
def test_constants_of_branches_beside_the_file(inner: bool, tmp_path: Path) -> None:
    """Of an If without norms, and where one was tried in vain."""
    norm = NORM.format("q") if inner else "q = MatMul(x, u)"
    one = made(f"{norm} o = Add(q, c)", "o = Mul(r, c)", ALONE, wm=numbers(4, D), u=numbers(4, 5))
    for branch in range(2):
        hide(one, branch, c=numbers(5))
    onnx.save(one, tmp_path / "in.onnx", save_as_external_data=True, location="in.data", size_threshold=16)
    report = normfuse.rewrite(tmp_path / "in.onnx", tmp_path / "out.onnx", EXACT)
    assert report.converted == 1 + inner
    for given in flags(ROWS):
        want, got = (session(tmp_path / name).run(None, given)[0] for name in ("in.onnx", "out.onnx"))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_what_failed_leaves_the_model_as_it_was() -> None:
    """With the constants in their branches."""
    one = hide(made(NORM.format("o"), "q = Neg(x) o = Unsqueeze(q, last)", last=np.array([-1])), 0, w=numbers(4, D))
    del one.graph.initializer[[i.name for i in one.graph.initializer].index("w")]
    one.graph.node.append(onnx.helper.make_node("Squeeze", ["y", "last"], ["z"]))
    one.graph.output[0].name = "z"
    report = check(one, [{"x": ROWS, "flag": np.array(False)}], 0, verify="sites")
    result = normfuse.optimize(one, EXACT)[0]
    assert {r.code for r in report.refusals} == {"NF304"}
    assert [i.name for i in result.graph.initializer] == [i.name for i in one.graph.initializer]
    assert [i.name for i in result.graph.node[0].attribute[0].g.initializer] == ["w"]


def test_a_quantised_branch_converts_nothing() -> None:
    one = made(NORM.format("o"), QUANTISED, u=numbers(4, 5), scale=np.float32(0.1), zero=np.uint8(3))
    assert [r.code for r in check(one, flags(ROWS), 0).refusals] == ["NF305"]


def test_certificates_of_both_branches_are_one() -> None:
    """Each figure is the worse one, and none where one is not known."""
    one = Certificate(True, 1e-15, 7, 2e-7, 1e-7, any_of=["Mix"])
    both = joined([one, Certificate(True, 1e-14, 5, 1e-7, 3e-7, any_of=["Attend"])])
    assert both == Certificate(True, 1e-14, 7, 2e-7, 3e-7, any_of=["Attend", "Mix"])
    assert joined([one, Certificate(True, 1e-14, 5)]) == Certificate(True, 1e-14, 7, any_of=["Mix"])


def test_a_mask_that_has_the_size_of_the_tokens_beside_a_cache() -> None:
    """As in optimum's merged decoders: in the branch with a cache that is the sum of both, so that only with nothing in
    the cache the model runs."""
    head = "h = Gather(table, ids) n = LayerNormalization<axis=-1>(h, g, b) q = MatMul(n, w)"
    tail = """t = Transpose<perm=[0,2,1]>(keys) s = MatMul(q, t) p = Add(s, mask) a = Softmax<axis=-1>(p)
              c = MatMul(a, keys) i = Add(h, c) l = LayerNormalization<axis=-1>(i, g, b) o = MatMul(l, k)"""
    lines = branches(f"{head} past3 = Squeeze(past, first) keys = Concat<axis=1>(past3, q) {tail}",
                     f"{head} keys = Identity(q) {tail}")  # fmt: skip
    given = f"int64[B,T] ids, float[B,1,T] mask, float[B,1,past_length,{D}] past, bool flag"
    held: dict[str, Any] = {"w": numbers(D, D), "k": numbers(D, 5), "table": numbers(9, D), "first": np.array([1])}
    ids, zeros = RNG.integers(0, 9, (2, 3)), np.zeros((2, 1, 3), np.float32)
    feeds = [{"ids": ids, "mask": zeros, "past": numbers(2, 1, 0, D), "flag": np.array(f)} for f in (True, False)]
    feeds.append({"ids": ids, "mask": numbers(2, 1, 7), "past": numbers(2, 1, 4, D), "flag": np.array(True)})
    check(model(given, lines, **held), feeds, 4, verify="sites")


def test_a_cache_that_may_not_be_empty() -> None:
    lines = """last = Gather<axis=2>(past, zero) h = MatMul(x, w) s = Add(h, last)
               y = LayerNormalization<axis=-1>(h, g, b)"""
    one = model(f"float[B,T,4] x, float[B,1,past_length,{D}] past", lines, "float[] y, float[] s", w=numbers(4, D),
                zero=np.array(0))  # fmt: skip
    report = normfuse.optimize(one, EXACT)[1]
    assert report.converted == 0 and report.refusals[0].code == "NF303"
    lines = """last = Gather<axis=2>(past, zero) h = MatMul(x, w) n = LayerNormalization<axis=-1>(h, g, b)
               s = Add(n, last) y = MatMul(s, k)"""
    one = model(f"float[B,T,4] x, float[B,1,past_length,{D}] past", lines, w=numbers(4, D), k=numbers(D, 5),
                zero=np.array(0))  # fmt: skip
    check(one, [{"x": ROWS, "past": numbers(2, 1, 4, D)}], 1, verify="sites")


def test_constants_of_a_branch_within_a_branch() -> None:
    """The certificate computes them in float64, too."""
    inner = """i = If (flag) <then_branch = t2 () => (float[] p) { p = Add(n, c) },
                               else_branch = e2 () => (float[] p) { p = Sub(n, c) }>"""
    one = made(f"h = MatMul(x, w) n = LayerNormalization<axis=-1>(h, g, b) {inner} o = MatMul(i, k)",
               "o = MatMul(x, u)", u=numbers(4, 5))  # fmt: skip
    nested = next(node for node in one.graph.node[0].attribute[0].g.node if node.op_type == "If")
    for attribute in nested.attribute:
        attribute.g.initializer.append(numpy_helper.from_array(numbers(D), "c"))
    check(one, flags(ROWS), 1, verify="sites")
