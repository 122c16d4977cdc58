"""ONNX graphs in which a shape, a constant or a name is not what it seems: outputs, their shapes too, stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

import normfuse
from normfuse.errors import InputError
from normfuse.sessions import session
from tests.cli_tools import saved
from tests.onnx_texts import FIRST, OLD, ROOT, SUM, TARGETS, ZERO, check, model, numbers


@pytest.mark.parametrize(("lines", "norms"), [
    (ROOT.format("x") + "sh = Shape<end=1>(z) to = Concat<axis=0>(sh, sixteen) e = Expand(r, to) y = Div(x, e)", 0),
    ("sh = Shape<end=1>(z) to = Concat<axis=0>(sh, sixteen) e = Expand(x, to) " + ROOT.format("x")
     + "y = Div(e, r)", 0),
    (ROOT.format("x") + "to = Shape(x) e = Expand(r, to) y = Div(x, e)", 1),
])  # fmt: skip
@pytest.mark.parametrize("target", TARGETS)
def test_an_expand_of_rows(lines: str, norms: int, target: str, tmp_path: Path) -> None:
    """With one row, it makes as many as something else has."""
    made = model("float[N,16] x, float[M,4] z", lines, sixteen=np.array([16]))
    check(made, [{"x": numbers(1, 16), "z": numbers(3, 4)}], tmp_path, norms, target)


@pytest.mark.parametrize(("op", "eps"), [("Max(e1, e2, e3)", 1e-2), ("Min(e1, e2, e3)", 1e-7), ("Max(e1)", 1e-6)])
def test_the_largest_of_three(op: str, eps: float, tmp_path: Path) -> None:
    made = model("float[N,16] x", f"eps = {op} " + ROOT.format("x") + "y = Div(x, r)", e1=np.float32(1e-6),
                 e2=np.float32(1e-7), e3=np.float32(1e-2))  # fmt: skip
    del made.graph.initializer[[v.name for v in made.graph.initializer].index("eps")]
    check(made, [{"x": numbers(2, 16) * np.float32(0.01)}], tmp_path, 1)
    assert normfuse.inspect(made).norms[0].eps == pytest.approx(eps)


@pytest.mark.parametrize("op", ["LessOrEqual", "GreaterOrEqual", "Less"])
def test_a_norm_behind_a_causal_mask(op: str, tmp_path: Path) -> None:
    """As TorchScript exports T5: the mask is compared by operators for which onnx has no rule but what they are made
    of."""
    made = model("float[2,S,16] x, int64[1,1,S] i, int64[1,S,1] j", f"c = {op}(i, j) f = Where(c, zero, low) "
                 "s = Softmax(f) h = MatMul(s, x) " + OLD.format("h", -1) + "y = Div(h, r)", "float[A,B,C] y", 13,
                 zero=np.float32(0), low=np.float32(-9))  # fmt: skip
    feeds = {"x": numbers(2, 3, 16), "i": np.arange(3).reshape(1, 1, 3), "j": np.arange(3).reshape(1, 3, 1)}
    check(made, [feeds], tmp_path, 1)


@pytest.mark.parametrize("square", ["Mul(c, c)", "Pow(c, two)"])
@pytest.mark.parametrize("rows", ["c = Expand(token, twice)", "c = Identity(token)", "c = Identity(row)"])
def test_a_norm_of_constants(rows: str, square: str, tmp_path: Path) -> None:
    """Such as a class token, which is small enough to be folded."""
    made = model("float[2,4,16] x", f"{rows} sq = {square} ms = ReduceMean(sq, last) a = Add(ms, eps) r = Sqrt(a) "
                 "n = Div(c, r) y = Mul(x, n)", "float[A,B,C] y", token=numbers(1, 1, 16), row=numbers(16),
                 twice=np.array([2, 1, 16]), two=np.float32(2))  # fmt: skip
    made.graph.node.add(op_type="Constant", output=["held"]).attribute.append(
        onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(numbers(16))))  # a node without operands
    check(made, [{"x": numbers(2, 4, 16)}], tmp_path, 1)


@pytest.mark.parametrize("shape", [(16, 16), (16, 1)])
def test_a_mean_by_a_matrix_that_is_computed(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Small products of constants are folded, but for squares of which a mean is taken."""
    made = model("float[N,16] x", "by = Mul(ones, part) sq = Mul(x, x) ms = MatMul(sq, by) a = Add(ms, eps) "
                 "r = Sqrt(a) y = Div(x, r)", ones=np.ones(shape, np.float32), part=np.float32(1 / 16))  # fmt: skip
    check(made, [{"x": numbers(3, 16)}], tmp_path, 1)


def test_a_shape_that_the_caller_may_replace(tmp_path: Path) -> None:
    made = model("float[N,16] x, int64[2] sh", """s = Reshape(x, sh) sq = Mul(s, s) su = ReduceSum(sq, last)
        ms = Mul(su, eighth) a = Add(ms, eps) r = Sqrt(a) y = Div(s, r)""", sh=np.array([-1, 8]),
                 eighth=np.float32(0.125))  # fmt: skip
    x = numbers(2, 16)
    check(made, [{"x": x}, {"x": x, "sh": np.array([-1, 4])}], tmp_path, 0)


@pytest.mark.parametrize(("inputs", "norms"), [("float[N,1,16] x", 0), ("float[3,1,16] x", 1)])
def test_a_squeeze_of_all_that_are_1(inputs: str, norms: int, tmp_path: Path) -> None:
    made = model(inputs, "s = Squeeze(x) " + OLD.format("s", -1) + "n = Div(s, r) y = Mul(n, w)", opset=17,
                 w=numbers(1, 16) if norms == 0 else numbers(16))  # fmt: skip
    check(made, [{"x": numbers(n, 1, 16)} for n in ((1, 3) if norms == 0 else (3,))], tmp_path, norms)


def test_a_row_of_a_matrix_of_sizes(tmp_path: Path) -> None:
    made = model("float[N,16] x", """sh = Shape(x) u = Unsqueeze(sh, zero) t = Gather<axis=0>(u, first)
        s = Reshape(x, t) """ + OLD.format("s", 0) + "y = Div(s, r)", opset=17, zero=np.array([0]),
                 first=np.array(0))  # fmt: skip
    x = numbers(3, 16)
    before = session(made.SerializeToString()).run(None, {"x": x})
    check(made, [{"x": x}], tmp_path, 1)
    assert before[0].shape == (3, 16)


@pytest.mark.parametrize(("inputs", "opset", "w", "behind"), [
    ("float[M] x", 17, np.float32(2.5), ""), ("float[4] x", 13, numbers(4), ""),
    ("float[4] x", 13, numbers(4), "z = Add(y, p)"),
])  # fmt: skip
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_a_norm_of_one_row_without_other_axes(inputs: str, opset: int, w: Any, behind: str, layer: bool, target: str,
                                              tmp_path: Path) -> None:  # fmt: skip
    """ONNX Runtime's own fusion of such breaks the model, so that it must not see the pattern in a function."""
    x = "d" if layer else "x"
    lines = ("m = ReduceMean<axes=[-1]>(x) d = Sub(x, m) " if layer else "") + OLD.format(x, -1)
    outputs = "float[A,B] z" if behind else "float[A] y"
    made = model(inputs, lines + f"n = Div({x}, r) y = Mul(n, w) {behind}", outputs, opset, w=w, p=numbers(2, 1))
    check(made, [{"x": numbers(4)}], tmp_path, 1, target)


@pytest.mark.parametrize(("lines", "want"), [
    ("Slice(k, five, low, zero, back)", [1.0]), ("ReduceProd<keepdims=0, noop_with_empty_axes=1>(k)", [1.0, 2.0, 3.0]),
])  # fmt: skip
def test_what_is_folded_is_what_runs(lines: str, want: list[float], tmp_path: Path) -> None:
    """As a factor of a norm: what numpy gives for these is something else."""
    made = model("float[N,3] x", ROOT.format("x") + f"n = Div(x, r) c = {lines} y = Mul(n, c)",
                 k=np.array([1, 2, 3], np.float32), five=np.array([-5]), low=np.array([-9]), zero=np.array([0]),
                 back=np.array([-1]))  # fmt: skip
    (found,) = session(made.SerializeToString()).run(None, {"x": np.ones((1, 3), np.float32)})
    np.testing.assert_allclose(found, np.broadcast_to(want, (1, 3)), rtol=1e-4)
    check(made, [{"x": numbers(2, 3)}], tmp_path, 1)


def test_a_query_without_weight_and_a_key_with_one(tmp_path: Path) -> None:
    """A pair at once: the standard operator has a weight in any case, so that a second run would see two alike."""
    lines = (ROOT.format("x") + "q = Div(x, r) sq2 = Mul(z, z) ms2 = ReduceMean(sq2, last) a2 = Add(ms2, eps) "
             "r2 = Sqrt(a2) n = Div(z, r2) o = Neg(n) k = Mul(n, w) kt = Transpose<perm=[0, 2, 1]>(k) "
             "at = MatMul(q, kt) sm = Softmax<axis=-1>(at) y = MatMul(sm, x)")  # fmt: skip
    made = model("float[A,B,8] x, float[A,B,8] z", lines, "float[A,B,8] y, float[A,B,8] o", 23, w=numbers(8))
    once = check(made, [{"x": numbers(2, 5, 8), "z": numbers(2, 5, 8)}], tmp_path, 3, "normfuse")
    assert [node.op_type for node in once.graph.node][:2] == ["qk_norm_plain_scale", "RMSNormalization"]
    normfuse.rewrite(tmp_path / "out.onnx", tmp_path / "twice.onnx", normfuse.Config(target="normfuse"))
    assert (tmp_path / "twice.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()


@pytest.mark.parametrize(("ir", "norms"), [(3, 1), (4, 0)])
@pytest.mark.parametrize("target", TARGETS)
def test_initializers_that_are_inputs(ir: int, norms: int, target: str, tmp_path: Path) -> None:
    """Once each had to be one, and nobody could give it; now it is one that the caller may replace."""
    lines = "h = Reshape(x, to) " + OLD.format("h", -1) + "d = Div(h, r) y = Mul(d, w)"
    made = model("float[B,T,32] x, int64[4] to, float eps, float[8] w", lines, "float[B,T,4,8] y", 13, w=numbers(8),
                 to=np.array([0, 0, 4, 8]))  # fmt: skip
    made.ir_version = ir
    check(made, [{"x": numbers(2, 3, 32)}], tmp_path, norms, target)
    report = normfuse.inspect(made)
    assert len(report.norms) == norms and [made.ir_version, len(made.graph.input)] == [ir, 4]
    inner = onnx_ir.from_proto(made)
    normfuse.inspect(inner)
    assert [inner.ir_version, len(inner.graph.inputs)] == [ir, 4]
    assert any("remove_initializer_from_input" in note for note in report.notes) == (not norms)


@pytest.mark.parametrize("target", TARGETS)
def test_two_sizes_that_are_not_known(target: str, tmp_path: Path) -> None:
    """One in the target of a Reshape, the other in its operand: not the same."""
    made = model("float[?,16,8] x, float[?,4] z", "sh = Shape<end=1>(z) to = Concat<axis=0>(sh, eight, minus) "
                 "s = Reshape(x, to) " + SUM.format("s") + "y = Div(s, r)", "float[A,B,C] y", eight=np.array([8]),
                 minus=np.array([-1]), inv=np.array(1 / 16, np.float32))  # fmt: skip
    for given in made.graph.input:
        given.type.tensor_type.shape.dim[0].Clear()
    check(made, [{"x": numbers(2, 16, 8), "z": numbers(4, 4)}], tmp_path, 0, target)


@pytest.mark.parametrize("rows", [
    "u0 = Unsqueeze(n0, zero) u1 = Unsqueeze(n1, zero)", "u0 = Reshape(n0, square) u1 = Reshape(n1, square)",
])  # fmt: skip
def test_a_matrix_of_one_size(rows: str, tmp_path: Path) -> None:
    """Two of them side by side have one row of two sizes."""
    made = model("float[N,M] x", f"""sh = Shape(x) n0 = Slice(sh, zero, one) n1 = Slice(sh, one, two) {rows}
                 row = Concat<axis=1>(u0, u1) to = Gather<axis=0>(row, first) s = Reshape(x, to) """
                 + FIRST.format("s") + "y = Div(s, r)", zero=ZERO, one=np.array([1]), two=np.array([2]),
                 first=np.array(0), square=np.array([1, 1]))  # fmt: skip
    check(made, [{"x": numbers(3, 16)}], tmp_path, 1)


@pytest.mark.parametrize("operation", ["ReduceProd<keepdims=0, noop_with_empty_axes=1>(sh)", "Identity(sh)"])
def test_a_product_over_no_axes(operation: str, tmp_path: Path) -> None:
    lines = f"sh = Shape(x) to = {operation} s = Reshape(x, to) {FIRST.format('s')} y = Div(x, r)"
    made = model("float[N,16] x", lines, zero=ZERO)
    check(made, [{"x": numbers(3, 16)}], tmp_path, 1)


def test_a_product_of_sizes_is_one(tmp_path: Path) -> None:
    lines = "sh = Shape(x) p = ReduceProd(sh) s = Reshape(x, p) " + FIRST.format("s") + "y = Div(s, r)"
    check(model("float[3,16] x", lines, "float[A] y", zero=ZERO), [{"x": numbers(3, 16)}], tmp_path, 1)


@pytest.mark.parametrize("end", [2**31 - 1, 2**63 - 1])
def test_backwards_to_the_end(end: int, tmp_path: Path) -> None:
    """ONNX Runtime gives both elements of the constant, numpy none."""
    made = model("float[N,3] x", ROOT.format("x") + "n = Div(x, r) b = Slice(k, one, end, zero, last) "
                 "c = Concat<axis=0>(b, k1) y = Mul(n, c)", k=numbers(2), k1=numbers(1), one=np.array([1]), zero=ZERO,
                 end=np.array([end]))  # fmt: skip
    check(made, [{"x": numbers(3, 3)}], tmp_path, 1)


@pytest.mark.parametrize(("turned", "norms"), [("Transpose(ab)", 0), ("Identity(ab)", 1)])
def test_a_square_of_two_absolute_values(turned: str, norms: int, tmp_path: Path) -> None:
    made = model("float[4,4] x", f"ab = Abs(x) tr = {turned} sq = Mul(ab, tr) ms = ReduceMean(sq, last) "
                 "a = Add(ms, eps) r = Sqrt(a) y = Div(x, r)")  # fmt: skip
    onnx.save(made, tmp_path / "in.onnx")
    report = normfuse.rewrite(tmp_path / "in.onnx", tmp_path / "out.onnx", normfuse.Config(verify="off"))
    assert len(report.norms) == norms


def test_a_quotient_of_integers(tmp_path: Path) -> None:
    """An eps of 7 // 2."""
    made = model("float[N,16] x", "sh = Shape<end=1>(x) to = Concat<axis=0>(sh, one) f = ConstantOfShape<value=int64[1]"
                 "{7}>(to) h = Div(f, two) c = Cast<to=1>(h) sq = Mul(x, x) ms = ReduceMean(sq, last) a = Add(ms, c) "
                 "r = Sqrt(a) y = Div(x, r)", one=np.array([1]), two=np.array(2))  # fmt: skip
    check(made, [{"x": numbers(3, 16)}], tmp_path, 1)


def test_a_type_that_a_quantized_value_is_given(tmp_path: Path) -> None:
    lines = "x = DequantizeLinear<output_dtype=10>(q, scale) " + ROOT.format("x") + "y = Div(x, r)"
    made = model("int8[N,16] q", lines, "float16[A,B] y", 23, scale=np.array(0.1, np.float32),
                 eps=np.array(1e-3, np.float16))  # fmt: skip
    result, report = normfuse.optimize(made)
    assert [n.op_type for n in result.graph.node] == ["DequantizeLinear", "RMSNormalization"]
    assert report.norms[0].action == "fused"


def test_names_that_are_taken(tmp_path: Path) -> None:
    """By a value of the model, and in a branch."""
    mended = model("float16[N,16] x0", "x = Add(x0, x0) y_normfuse0 = Neg(x) y = RMSNormalization(x, w)",
                   "float[A,B] y, float16[A,B] y_normfuse0", 23, w=numbers(16))  # fmt: skip
    result, report = normfuse.optimize(mended)  # the type of x is inferred
    session(result.SerializeToString()).run(None, {"x0": np.ones((2, 16), np.float16)})
    assert any("given a Cast" in note for note in report.notes)
    lines = """t0 = Sigmoid(x) n1 = LayerNormalization<axis=-1>(t0, g, b) u1 = MatMul(n1, w) t = Add(t0, u1)
        n2 = LayerNormalization<axis=-1>(t, g, b) y = MatMul(n2, w2) z = If (c) <
            then_branch = t1 () => (float[2,3,8] za) { t0_centred = Neg(y) za = Neg(t0_centred) },
            else_branch = t2 () => (float[2,3,8] zb) { zb = Abs(y) }>"""
    made = model("float[2,3,8] x, bool c", lines, "float[A,B,C] z", g=numbers(8), b=numbers(8), w=numbers(8, 8),
                 w2=numbers(8, 8))  # fmt: skip
    result, report = normfuse.optimize(made, normfuse.Config(layernorm_to_rmsnorm="exact"))
    assert [n.action for n in report.norms] == ["converted"] * 2
    assert {"t0_centred_2"} <= {v for node in result.graph.node for v in node.output}
    onnx.checker.check_model(result, full_check=True)


def test_quantization_annotations_stay_as_many() -> None:
    made = model("float[N,16] x", "z = Neg(x) " + ROOT.format("z") + "n = Div(z, r) y = Mul(n, w)", w=numbers(16))
    for name in "xwzy":
        entry = made.graph.quantization_annotation.add(tensor_name=name)
        entry.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w")
    once, _ = normfuse.optimize(made)
    assert sorted(q.tensor_name for q in once.graph.quantization_annotation) == sorted("xwzy")
    assert normfuse.optimize(once)[0].SerializeToString() == once.SerializeToString()


@pytest.mark.parametrize("weight", ["w", "v"])
def test_a_constant_that_is_added_to_x_and_the_weight(weight: str, tmp_path: Path) -> None:
    made = model("float[4] x", "h = Add(x, w) mu = ReduceMean(h, last) d = Sub(h, mu) " + ROOT.format("d")
                 + f"n = Div(d, r) y = Mul(n, {weight})", "float[A] y", w=numbers(4), v=numbers(4))  # fmt: skip
    check(made, [{"x": numbers(4)}], tmp_path, 1)
    assert normfuse.inspect(tmp_path / "in.onnx").norms[0].kind == "layer_norm"


@pytest.mark.parametrize("rows", [2, 5])
def test_zeros_of_as_many_rows(rows: int, tmp_path: Path) -> None:
    """The check cuts rows down only where no constant has them."""
    zeros = "zero = Constant<value: tensor = float {0.0}> () zs = Expand(zero, to) z = Mul(x, two) h = Add(zs, z) "
    made = model(f"float[{rows},16] x", zeros + ROOT.format("h") + "y = Div(h, r)", to=np.array([rows, 16]),
                 two=np.array(2, np.float32))  # fmt: skip
    check(made, [{"x": numbers(rows, 16)}], tmp_path, 1)


@pytest.mark.parametrize(("pool", "norms"), [
    ("kernel_shape=[16]", 1), ("kernel_shape=[16], strides=[3]", 1), ("kernel_shape=[15], strides=[3]", 0),
    ("kernel_shape=[16], pads=[1,0], strides=[3]", 0), ('kernel_shape=[16], auto_pad="SAME_UPPER", strides=[16]', 0),
    ('kernel_shape=[16], auto_pad="VALID"', 1), ("kernel_shape=[8], dilations=[2], strides=[9]", 0)])  # fmt: skip
def test_a_pool_over_all_of_an_axis(pool: str, norms: int, tmp_path: Path) -> None:
    lines = f"sq = Mul(x, x) ms = AveragePool<{pool}>(sq) a = Add(ms, eps) r = Sqrt(a) q = Div(x, r) y = Mul(q, w)"
    made = model("float[2,3,16] x", lines, "float[A,B,C] y", opset=19, w=numbers(16))
    check(made, [{"x": numbers(2, 3, 16)}], tmp_path, norms)


@pytest.mark.parametrize("before", ["Relu(x)", "CumSum(x, one)"])
@pytest.mark.parametrize("verify", ["off", "sites"])
def test_a_size_that_is_left_over_from_an_export(before: str, verify: Any, tmp_path: Path) -> None:
    """The inputs leave open what a value_info says is 1: a norm over it is over two axes."""
    lines = f"h = {before} sq = Mul(h, h) ms = ReduceMean(sq, two) a = Add(ms, eps) r = Sqrt(a) y = Div(h, r)"
    made = model("float[B,T,8] x", lines, "float[B,T,8] y", two=np.array([1, 2]), one=np.array(1))
    made.graph.value_info.append(onnx.helper.make_tensor_value_info("h", onnx.TensorProto.FLOAT, [1, 1, 8]))
    config, x = normfuse.Config(verify=verify), numbers(2, 5, 8)
    done, report = normfuse.optimize(made, config)
    assert [n.axes for n in report.norms] == [[-2, -1]]
    want, got = (session(m.SerializeToString()).run(None, {"x": x})[0] for m in (made, done))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_shapes_that_follow_from_one_another(tmp_path: Path) -> None:
    """A reshape to a computed shape behind operators that only `onnx` knows, twelve times: each has a shape at once."""
    lines = "".join(f"""c{i} = Conv<kernel_shape=[3], pads=[1,1]>(y{i}, k) s{i} = Shape(c{i}) f{i} = Reshape(c{i}, s{i})
        q{i} = Mul(f{i}, f{i}) m{i} = ReduceMean(q{i}, last) a{i} = Add(m{i}, eps) r{i} = Sqrt(a{i})
        y{i + 1} = Div(f{i}, r{i})
    """ for i in range(12))  # fmt: skip
    made = model("float[N,4,16] y0", lines, "float[N,4,16] y12", k=numbers(4, 4, 3))
    check(made, [{"y0": numbers(2, 4, 16)}], tmp_path, 12)


@pytest.mark.parametrize(("most", "norms"), [(np.inf, 1), (3.4e38, 1), (1e30, 0), (np.nan, 0)])
def test_a_clamp_from_above(most: float, norms: int) -> None:
    lines = "sq = Mul(x, x) ms = ReduceMean(sq, last) c = Clip(ms, low, most) a = Add(c, eps) r = Sqrt(a) y = Div(x, r)"
    made = model("float[3,16] x", lines, low=np.array(0, np.float32), most=np.array(most, np.float32))
    assert len(normfuse.inspect(made).norms) == norms


def test_two_rows_of_a_size_that_only_onnx_leaves_open(tmp_path: Path) -> None:
    """The sizes behind a Flatten have no name in the model, and the two summands have the same."""
    lines = "f = Flatten<axis=2>(x) n = Neg(f) g = Abs(f) s = Add(n, g) " + ROOT.format("s") + "y = Div(s, r)"
    made = model("float[B,T,16] x", lines, "float[A,C] y")
    done = check(made, [{"x": numbers(2, 3, 16)}], tmp_path, 1, "normfuse")
    assert any(node.op_type.startswith("add_rms_norm") for node in done.graph.node)


def test_a_symbol_of_the_model_that_looks_like_ours(tmp_path: Path) -> None:
    """Then nothing says that the two sizes are one: the second may be spread over the first."""
    lines = "f = Flatten<axis=2>(x) h = Add(f, z) " + ROOT.format("h") + "y = Div(h, r)"
    made = model("float[B,T,16] x, float[Q,16] z", lines, "float[A,C] y")
    made.graph.input[1].type.tensor_type.shape.dim[0].dim_param = "0 of f"
    feeds = [{"x": numbers(2, 3, 16), "z": numbers(6, 16)}, {"x": numbers(1, 1, 16), "z": numbers(4, 16)}]
    done = check(made, feeds, tmp_path, 1, "normfuse")
    assert not any(node.op_type.startswith("add_rms_norm") for node in done.graph.node)


def test_the_size_of_a_row_that_only_the_inputs_leave_open(tmp_path: Path) -> None:
    """The weight settles it, and a value_info knows it."""
    lines = "h = Neg(x) " + ROOT.format("h") + "q = Div(h, r) y = Mul(q, w)"
    made = model("float[B,S,H] x", lines, "float[A,B,C] y", w=numbers(8))
    made.graph.value_info.append(onnx.helper.make_tensor_value_info("h", onnx.TensorProto.FLOAT, ["B", "S", 8]))
    check(made, [{"x": numbers(2, 3, 8)}], tmp_path, 1)
    assert normfuse.inspect(made).norms[0].size == 8


@pytest.mark.parametrize("heads", [2, 16])
def test_the_shape_of_a_constant(heads: int, tmp_path: Path) -> None:
    """Small or large, as keras_hub's einsum layers have it in the target of a Reshape."""
    lines = """f = Reshape(x, flat) h = MatMul(f, product) sx = Shape<end=2>(x) sw = Shape<start=1>(big)
    to = Concat<axis=0>(sx, sw) q = Reshape(h, to) """ + ROOT.format("q") + "n = Div(q, r) y = Mul(n, w)"
    made = model("float[B,S,16] x", lines, "float[A,B,C,D] y", big=numbers(16, heads, 8), w=numbers(8),
                 product=numbers(16, heads * 8), flat=np.array([-1, 16]))  # fmt: skip
    check(made, [{"x": numbers(2, 3, 16)}], tmp_path, 1)


def test_an_initializer_has_the_shape_that_it_has(tmp_path: Path) -> None:
    """Not the open one that a value_info states."""
    lines = """sq = Mul(x, x) ms = ReduceMean(sq, last) z = Where(yes, ms, rest) a = Add(z, eps) r = Sqrt(a)
    n = Div(x, r) y = Mul(n, w)"""
    made = model("float[2,8] x", lines, yes=np.array(True), rest=np.full((2, 1), np.nan, np.float32), w=numbers(8))
    made.graph.value_info.append(onnx.helper.make_tensor_value_info("rest", onnx.TensorProto.FLOAT, [None, None]))
    check(made, [{"x": numbers(2, 8)}], tmp_path, 1)


def test_statistics_in_float16_have_no_standard_operator(tmp_path: Path) -> None:
    """Of LayerNormalization the standard defines float32 and bfloat16 alone: any other runtime could not expand it."""
    lines = """m = ReduceMean(x, last) d = Sub(x, m) q = Mul(d, d) v = ReduceMean(q, last) e = Add(v, small) r = Sqrt(e)
    n = Div(d, r) k = Mul(n, w) y = Add(k, b)"""
    half: dict[str, Any] = {name: numbers(16).astype(np.float16) for name in ("w", "b")}
    made = model("float16[B,16] x", lines, "float16[B,16] y", small=np.array(1e-3, np.float16), **half)
    x = numbers(5, 16).astype(np.float16)
    targets: list[Any] = [*TARGETS]
    for target in targets:
        done, report = normfuse.optimize(made, normfuse.Config(target=target))
        assert [n.action for n in report.norms] == ["kept" if target == "standard" else "fused"]
        stock = any(node.op_type == "LayerNormalization" for node in done.graph.node)
        assert stock == (target == "ort-cpu")
        if not stock:
            found: Any = next(iter(ReferenceEvaluator(done).run(None, {"x": x})))
            np.testing.assert_allclose(found, session(made.SerializeToString()).run(None, {"x": x})[0], atol=0.02)


def test_what_is_removed_is_removed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnx_ir looks at all outputs of a graph for each removal."""
    calls, remove, counts = [0], onnx_ir.Graph.remove, []

    def counted(self: Any, nodes: Any, *args: Any, **kwargs: Any) -> None:
        calls[0] += 1
        remove(self, nodes, *args, **kwargs)

    for norms in (4, 40):
        parts = [f"q{i} = Mul(x{i}, x{i}) m{i} = ReduceMean(q{i}, last) a{i} = Add(m{i}, eps) r{i} = Sqrt(a{i}) "
                 f"y{i} = Div(x{i}, r{i})" for i in range(norms)]  # fmt: skip
        given = ", ".join(f"float[2,16] x{i}" for i in range(norms))
        made = model(given, " ".join(parts), ", ".join(f"float[2,16] y{i}" for i in range(norms)))
        calls[0] = 0
        with monkeypatch.context() as patch:
            patch.setattr(onnx_ir.Graph, "remove", counted)
            assert normfuse.optimize(made, normfuse.Config(verify="off"))[1].fused == norms
        counts.append(calls[0])
    assert counts[0] == counts[1]


def test_weights_that_are_inputs_too_are_no_attention() -> None:
    """As in files of IR version 3."""
    lines = """n = LayerNormalization(x, w, b) d = MatMul(n, k) h = Add(d, x) m = LayerNormalization(h, w, b)
    y = MatMul(m, k)"""
    made = model("float[2,3,16] x", lines, "float[2,3,16] y", w=numbers(16), b=numbers(16), k=numbers(16, 16))
    plain = normfuse.inspect(made).recipe
    for held in made.graph.initializer:
        made.graph.input.append(onnx.helper.make_tensor_value_info(held.name, held.data_type, list(held.dims)))
    assert normfuse.inspect(made).recipe == plain == "LayerNorm, pre-norm"


def test_files_of_onnx_runtimes_own_format(tmp_path: Path) -> None:
    made = model("float[2,16] x", "y = LayerNormalization(x, w)", w=numbers(16))
    source = saved(made, tmp_path / "in.onnx")
    with pytest.raises(InputError, match="takes such a name for its own format"):
        normfuse.rewrite(source, tmp_path / "out.ort")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "own.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    with pytest.raises(InputError, match="in ONNX Runtime's own format"):
        normfuse.inspect(tmp_path / "own.ort")
