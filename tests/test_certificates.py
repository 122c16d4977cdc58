"""LayerNorm to RMSNorm where the certificate, which draws every constant at random, has to leave some as they are, and
to know what the numbers were that a rewrite rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

import normfuse
from normfuse.folding import Folder
from normfuse.frontends import onnx_certify
from normfuse.frontends.onnx_certify import OPERATORS
from normfuse.frontends.onnx_kernels import KERNELS
from normfuse.sessions import session
from normfuse.verify import DoesNotRun, compare_models
from tests.cli_tools import saved
from tests.converted import D, check, model, numbers

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


def test_an_eps_that_is_expanded_to_a_size_of_the_run() -> None:
    spelled = SPELLED.replace("{mean}", "ReduceMean<axes=[-1]>({0})").replace("{var}", "ReduceMean<axes=[-1]>({1}q)")
    spelled = spelled.replace("Add({1}v, eps)", "Add({1}v, {1}x)").replace("{1}e =", "{1}s = Shape({1}v) "
                                                                          "{1}x = Expand(eps, {1}s) {1}e =")
    check(model("int64[B,3] i", f"{chain(spelled)} y = Neg(n)", opset=13, **HELD), IDS, 2, verify="sites")


@pytest.mark.parametrize("verify", ["off", "sites"])
@pytest.mark.parametrize("op", ["InstanceNormalization(c, ones, zeros)", "InstanceNormalization(c, same, zeros)"])
def test_an_instance_normalization_of_rows(op: str, verify: str) -> None:
    norm = f"{{1}}n = {op.replace('(c', '({0}')} {{1}}m = Mul({{1}}n, g) {{1}} = Add({{1}}m, b)"
    held = HELD | {"ones": np.ones(3, np.float32), "zeros": np.zeros(3, np.float32)}
    check(model("int64[1,3] i", f"same = Identity(ones) {chain(norm)} y = Neg(n)", **held), IDS, 2, verify=verify)


@pytest.mark.parametrize("shape", ["[B,S]", "[1]", ""])
def test_a_table_of_one_row(shape: str) -> None:
    """As RoBERTa's of kinds of tokens: of the numbers that are drawn none but 0 is a row of it."""
    lines = f"""a = Gather(table, i) t = Gather(one, k) h = Add(a, t) {OPERATOR.format('h', 'n')} y = MatMul(n, w)"""
    kinds: dict[str, tuple[int, ...]] = {"": (), "[1]": (1,), "[B,S]": (2, 3)}
    feeds = [{"i": np.array([[0, 3, 1], [2, 1, 1]]), "k": np.zeros(kinds[shape], np.int64)}]
    check(model(f"int64[B,S] i, int64{shape} k", lines, one=numbers(1, D), **HELD), feeds, 1, verify="sites")


@pytest.mark.parametrize("shape", ["1,3", "B,S", "2,2"])
def test_query_and_key_straight_from_a_table(shape: str) -> None:
    """They tell nothing where all tokens of a row are the same."""
    lines = f"""h = Gather(table, i) q = MatMul(h, w) k = MatMul(h, w2) v = MatMul(h, w3)
{OPERATOR.format('q', 'qn')}
{OPERATOR.format('k', 'kn')} t = Transpose<perm=[0, 2, 1]>(kn) s = MatMul(qn, t) d = Div(s, by) a = Softmax(d)
o = MatMul(a, v) y = Neg(o)"""
    held = {"w2": numbers(D, D), "w3": numbers(D, D), "by": np.float32(16)} | HELD
    feeds = [{"i": np.array([[0, 3, 1], [2, 1, 1]])[: 1 if shape == "1,3" else 2, : 2 if shape == "2,2" else 3]}]
    check(model(f"int64[{shape}] i", lines, **held), feeds, 2, verify="sites")


@pytest.mark.parametrize("hide", ["Sqrt(l)", "Div(l, none)"])
def test_outputs_that_show_nothing_certify_nothing(hide: str) -> None:
    """NaN or infinities alone, where no constant is edited whose edit could be left out to see."""
    lines = f"""{OPERATOR.format('x', 'n')} {OPERATOR.format('x', 'k')} s = Mul(n, n) p = Mul(k, k) o = Add(s, p)
    a = Add(o, one) l = Neg(a) y = {hide}"""
    made = model(f"float[B,S,{D}] x", lines, one=np.float32(1), none=np.float32(0))
    report = normfuse.optimize(made, normfuse.Config(layernorm_to_rmsnorm="exact"))[1]
    assert report.converted == 0 and {r.code for r in report.refusals} == {"NF304"}


PADDED = f"""h = Gather(table, i) {OPERATOR.format('h', 'n')} q = MatMul(n, w) k = MatMul(n, w2) v = MatMul(n, w3)
t = Transpose<perm=[0, 2, 1]>(k) s = MatMul(q, t) {{mask}} a = Softmax(m) o = MatMul(a, v) h1 = Add(h, o)
{OPERATOR.format('h1', 'n1')} y = MatMul(n1, w)"""


@pytest.mark.parametrize(("kind", "mask"), [
    ("bool", "u = Unsqueeze(padding_mask, one) m = Where(u, low, s)"),
    ("bool", "u = Unsqueeze(padding_mask, one) m = Where(u, s, low)"),
    ("int64", "c = Cast<to=9>(padding_mask) u = Unsqueeze(c, one) m = Where(u, low, s)"),
    ("int64", "c = Cast<to=9>(padding_mask) u = Unsqueeze(c, one) m = Where(u, s, low)")])
def test_a_mask_of_what_is_left_out_or_of_what_is_kept(kind: str, mask: str) -> None:
    """Of one of the two all true leaves no number."""
    held = {"w2": numbers(D, D), "w3": numbers(D, D), "low": np.float32(-np.inf), "one": np.array([1])} | HELD
    given = np.array([[0, 0, 1], [1, 0, 0]]).astype(bool if kind == "bool" else np.int64)
    feeds = [{"i": np.array([[0, 3, 1], [2, 1, 1]]), "padding_mask": given}]
    lines = PADDED.replace("{mask}", mask)
    check(model(f"int64[B,S] i, {kind}[B,S] padding_mask", lines, **held), feeds, 2, verify="sites")


@pytest.mark.parametrize("bias", ["zeros", "own"])
def test_the_only_edit_is_of_a_bias_of_zeros(bias: str) -> None:
    """As a model has it before it is trained."""
    lines = f"""n = LayerNormalization<axis=-1>(x, ones, {bias}) {OPERATOR.format('n', 'n2')}
    n3 = LayerNormalization<axis=-1>(x, g, b2) y = Add(n2, n3)"""
    made = model(f"float[B,S,{D}] x", lines, zeros=np.zeros(D, np.float32), own=numbers(D), ones=np.ones(D, np.float32),
                 b2=numbers(D))  # fmt: skip
    check(made, [{"x": numbers(2, 3, D)}], 3, verify="sites")


@pytest.mark.parametrize("total", ["past + S", "S + past", "total"])
def test_a_mask_of_so_many_tokens_as_are_past_and_new(total: str) -> None:
    """As decoders have it: an open size may be the sum of two."""
    lines = f"""h = MatMul(x, w) {OPERATOR.format('h', 'n')} all = Concat<axis=1>(cache, n) u = Unsqueeze(mask, last)
    masked = Mul(all, u) mean = ReduceMean<axes=[1]>(masked) y = Add(n, mean)"""
    made = model(f"float[B,S,{D}] x, float[B,past,{D}] cache, float[B,total] mask", lines, opset=17,
                 last=np.array([-1]), **HELD)  # fmt: skip
    made.graph.input[2].type.tensor_type.shape.dim[1].dim_param = total
    check(made, [{"x": numbers(2, 3, D), "cache": numbers(2, 4, D), "mask": numbers(2, 7)}], int(total != "total"),
          verify="sites")  # fmt: skip


@pytest.mark.parametrize(("ahead", "group", "channels"), [
    ("i = Identity(x)", 1, 3), ("f = Cast<to=1>(x) s = Div(f, far) i = Sub(s, by)", 1, 3), ("i = Identity(x)", 2, 6),
    ("i = Mul(by, x)", 1, 3), ("i = Identity(x) scaled = Mul(each, kernel)", 1, 3)])
def test_the_channels_of_an_image_are_those_of_the_convolution(ahead: str, group: int, channels: int,
                                                               tmp_path: Path) -> None:  # fmt: skip
    kernel = numbers(D, 3, 4, 4)
    weight = "scaled" if "scaled" in ahead else "kernel"
    lines = f"""{ahead} c = Conv<strides=[4,4], group={group}>(i, {weight}) t = Transpose<perm=[0,2,3,1]>(c)
    {OPERATOR.format('t', 'y')}"""
    made = model("float[batch,num_channels,height,width] x", lines, kernel=kernel, far=np.float32(255),
                 by=numbers(1, 3, 1, 1), each=numbers(D, 1, 1, 1))  # fmt: skip
    check(made, [{"x": numbers(2, channels, 8, 8)}], int(group == 1), verify="sites")
    path = saved(made, tmp_path / "image.onnx")
    assert compare_models(path, path)["equal"]


# -- operators that nothing here computes ------------------------------------------------------------------------------


BLOCK = """h = Gather(table, i) n = LayerNormalization<axis=-1>(h, g, b) q = MatMul(n, w) {attention} o = MatMul(a, w4)
h1 = Add(h, o) n1 = LayerNormalization<axis=-1>(h1, g, b) y = MatMul(n1, w3)"""
ATTENTIONS = {
    "MultiHeadAttention": """k = MatMul(n, w) v = MatMul(n, w2)
        a = com.microsoft.MultiHeadAttention<num_heads=2>(q, k, v)""",
    "masked": """k = MatMul(n, w) v = MatMul(n, w2)
        a = com.microsoft.MultiHeadAttention<num_heads=2>(q, k, v, , , low)""",
    "Attention": "a = com.microsoft.Attention<num_heads=2>(n, packed, packed_b)",
    "GroupQueryAttention": """k = MatMul(n, w) v = MatMul(n, w2)
        a, pk, pv = com.microsoft.GroupQueryAttention<num_heads=1, kv_num_heads=1>(q, k, v, , , last, total)""",
}


def attending(kind: str) -> onnx.ModelProto:
    held: dict[str, Any] = HELD | {
        "w2": numbers(D, D), "w4": numbers(D, D), "w3": numbers(D, 5), "packed": numbers(D, 3 * D),
        "packed_b": numbers(3 * D), "low": np.full((1, 1, 3, 3), np.finfo(np.float32).min),
        "last": np.array([2], np.int32), "total": np.array(3, np.int32)}  # fmt: skip
    made = model("int64[1,3] i", BLOCK.format(attention=ATTENTIONS[kind]), **held)
    made.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return made


@pytest.mark.parametrize("kind", sorted({*ATTENTIONS} - {"masked"}))
def test_an_operator_that_is_not_computed_counts_as_any_function(kind: str) -> None:
    report = check(attending(kind), IDS, 2, verify="sites")
    assert any(f"the certificate computes no {kind}: it holds whatever" in note for note in report.notes)
    made = report.norms[0].conversion["check"]
    assert made["max_rel"] < 1e-12 and made["error_before"] is None


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_leaving_out_an_edit_beside_it_fails_the_certificate(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, left_out, plans = Folder.run, [-1], list[int]()

    def without(self: Folder, *args: Any) -> None:
        run(self, *args)
        found = [*self.plan.edits]
        plans.append(len(found))
        if left_out[0] >= 0:
            del self.plan.edits[found[left_out[0]]]

    monkeypatch.setattr(Folder, "run", without)
    made, asked = attending(kind), normfuse.Config(layernorm_to_rmsnorm="exact")
    assert normfuse.optimize(made, asked)[1].converted == 2 and plans[0] >= 2
    for left_out[0] in range(plans[0]):
        report = normfuse.optimize(made, asked)[1]
        assert report.converted == 0 and any("differ" in r.message for r in report.refusals if r.code == "NF304")


def test_what_a_branch_gives_is_read() -> None:
    """Of an operator there the size is not known, so that the model cannot be certified, and nothing is converted."""
    branches = ", ".join(f"{name} = {graph} () => (float[1,3,8] {out}) {{ {out} = com.microsoft.Attention<num_heads=2>"
                         f"(n, packed, packed_b) }}" for name, graph, out in (
                             ("then_branch", "t", "p"), ("else_branch", "f", "r")))  # fmt: skip
    lines = f"h = Gather(table, i) {OPERATOR.format('h', 'n')} y = If(flag) <{branches}>"
    made = model("int64[1,3] i, bool flag", lines, packed=numbers(D, 3 * D), packed_b=numbers(3 * D), **HELD)
    made.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    report = normfuse.optimize(made, normfuse.Config(layernorm_to_rmsnorm="exact"))[1]
    assert report.converted == 0 and any("its size" in r.message for r in report.refusals if r.code == "NF304")


@pytest.mark.parametrize(("shape", "why"), [("[1,3,8]", ""), ("[1,3,K]", "its size"), ("", "its size")])
def test_a_result_of_unknown_size_cannot_stand_for_itself(shape: str, why: str) -> None:
    held = HELD | {"w4": numbers(D, D), "w3": numbers(D, 5)}
    made = model("int64[1,3] i", BLOCK.format(attention="a = my.own.Mix(q)"), **held)
    made.opset_import.append(onnx.helper.make_opsetid("my.own", 1))
    if shape:
        dims = [int(d) if d.isdigit() else d for d in shape[1:-1].split(",")]
        made.graph.value_info.append(onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, dims))
    report = normfuse.optimize(made, normfuse.Config(layernorm_to_rmsnorm="exact"))[1]
    assert report.converted == (0 if why else 2), report.refusals
    assert not why or not shape or any("could not run" in r.message and why in r.message for r in report.refusals)


@pytest.mark.parametrize("shape", [[], [1]])
def test_a_single_number_stands_for_itself_too(shape: list[int]) -> None:
    lines = f"h = Gather(table, i) {OPERATOR.format('h', 'n')} f = MatMul(n, w) a = my.own.Norm(f) y = Mul(f, a)"
    made = model("int64[1,3] i", lines, **HELD)
    made.opset_import.append(onnx.helper.make_opsetid("my.own", 1))
    made.graph.value_info.append(onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, shape))
    assert normfuse.optimize(made, normfuse.Config(layernorm_to_rmsnorm="exact"))[1].converted == 1


def test_the_norm_of_embeddings_is_computed() -> None:
    """What is made of it is read by the algebra, so that no other function may stand for it."""
    lines = f"""h, m, s = com.microsoft.EmbedLayerNormalization(i, , table, places, , g, b) k = Mul(h, g)
    {OPERATOR.format('k', 'n')} o = MatMul(n, w) h2 = Add(s, o) {OPERATOR.format('h2', 'l')} y = MatMul(l, w)"""
    made = model("int32[1,3] i", lines, places=numbers(5, D), **HELD)
    made.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    feeds = [{"i": IDS[0]["i"].astype(np.int32)}]
    want = session(made.SerializeToString()).run(None, feeds[0])[0]
    got: Any = ReferenceEvaluator(made, new_ops=OPERATORS).run(None, feeds[0])
    np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-4)
    report = normfuse.optimize(made, normfuse.Config(layernorm_to_rmsnorm="exact"))[1]
    assert not any(r.code == "NF304" for r in report.refusals), report.refusals
    assert not any("the certificate computes no" in note for note in report.notes)


def test_skip_operators_are_computed_as_onnx_runtime_does() -> None:
    rng = np.random.default_rng(0)
    for op, rows in (("SkipLayerNormalization", 2), ("SkipLayerNormalization", 1), ("SkipLayerNormalization", 0),
                     ("SkipSimplifiedLayerNormalization", 1), ("SkipSimplifiedLayerNormalization", 0)):  # fmt: skip
        names = ["x", "r", "g", *"bc"[:rows]]
        inputs = ", ".join(f"float[2,3,{D}] {n}" if n in "xr" else f"float[{D}] {n}" for n in names)
        made = onnx.parser.parse_model(
            f'<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]> a ({inputs}) => (float[2,3,{D}] y, '
            f"float[2,3,{D}] s) {{ y, , , s = com.microsoft.{op}<epsilon = 0.01>({', '.join(names)}) }}")  # fmt: skip
        feeds = {n: rng.standard_normal((2, 3, D) if n in "xr" else D).astype("f4") for n in names}
        want = session(made.SerializeToString()).run(None, feeds)
        node = made.graph.node[0]
        got = ReferenceEvaluator(made, new_ops=OPERATORS).rt_nodes_[0].run(*(feeds[n] for n in node.input))
        for a, b in zip(want, (got[0], got[3]), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("more", [
    "", ', activation = "Relu"', ', activation = "Tanh"', ', activation = "Sigmoid"',
    ', activation = "LeakyRelu", activation_params = [0.125]', ', activation = "Clip", activation_params = [-0.5, 0.5]',
    ', activation = "HardSigmoid", activation_params = [0.25, 0.5]'])  # fmt: skip
@pytest.mark.parametrize("given", ["x, w", "x, w, b", "x, w, b, z"])
def test_convolutions_of_onnx_runtime_in_the_check(more: str, given: str) -> None:
    made = onnx.parser.parse_model(f'''<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
        g (float[2, 4, 6, 6] x, float[6, 2, 3, 3] w, float[6] b, float[2, 6, 3, 3] z) => (float[2, 6, 3, 3] y) {{
        y = com.microsoft.FusedConv<group = 2, strides = [2, 2], pads = [1, 1, 1, 1], kernel_shape = [3, 3] {more}>
            ({given}) }}''')
    rng = np.random.default_rng(0)
    sizes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in made.graph.input}
    feeds = {name: rng.standard_normal(size).astype("f4") for name, size in sizes.items()}
    (want,) = session(made.SerializeToString()).run(None, feeds)
    got: Any = next(iter(ReferenceEvaluator(made, new_ops=KERNELS).run(None, feeds)))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", ["int64[1]", "int64"])
@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_one_hot_in_the_check(depth: str, axis: int) -> None:
    """The depth may be of shape [1], and an index count from the end."""
    made = onnx.parser.parse_model(f'''<ir_version: 8, opset_import: ["": 17]>
        g (int64[2, 3] i, {depth} n, float[2] v) => (float[a, b, c] y) {{ y = OneHot<axis = {axis}>(i, n, v) }}''')
    n, v = np.full((1,) if "[" in depth else (), 5), np.array([2, 7], np.float32)
    feeds = {"i": np.array([[0, -1, 3], [5, 4, -5]]), "n": n, "v": v}
    (want,) = session(made.SerializeToString()).run(None, feeds)
    got: Any = next(iter(ReferenceEvaluator(made, new_ops=KERNELS).run(None, feeds)))
    assert np.array_equal(got, want) and got.dtype == want.dtype


def test_a_batch_without_a_number_in_a_model_of_one() -> None:
    """As torch exports it with an example of one: what runs for two is tried first, and then for one."""
    lines = f"""k = Gather(table, i) q = Squeeze(k, first) h = Unsqueeze(q, first)
    {OPERATOR.format('h', 'n')} y = MatMul(n, w)"""
    made = model("int64[B,S] i", lines, first=np.array([0]), **HELD)
    with pytest.raises(Exception, match="Squeeze"):
        session(made.SerializeToString()).run(None, {"i": np.zeros((2, 3), np.int64)})
    assert normfuse.optimize(made, normfuse.Config(layernorm_to_rmsnorm="exact"))[1].converted == 1


@pytest.mark.parametrize(("error", "converted"), [(DoesNotRun("no"), 1), (ValueError("no"), 0)])
def test_a_result_that_does_not_run_for_two(error: Exception, converted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where the model itself does not either is a batch of one tried."""
    own = onnx_certify._certify

    def certify(*args: Any) -> Any:
        if args[4]["i"][0] == 2:
            raise error
        return own(*args)

    monkeypatch.setattr(onnx_certify, "_certify", certify)
    made = model("int64[B,S] i", f"h = Gather(table, i) {OPERATOR.format('h', 'n')} y = MatMul(n, w)", **HELD)
    assert normfuse.optimize(made, normfuse.Config(layernorm_to_rmsnorm="exact"))[1].converted == converted
