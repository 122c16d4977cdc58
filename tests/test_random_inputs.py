"""Random inputs that a model runs on: what its sizes are where it leaves them open."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

import normfuse
from normfuse.bench import How, bench
from normfuse.errors import InputError
from normfuse.frontends.onnx_contrib import head_sizes
from normfuse.io.files import read_onnx
from normfuse.verify import compare_models, run_both, run_random, session, shapes_for
from tests.cli_tools import run, saved

WIDTH, HEADS, HEAD = 32, 4, 8
CACHE = "float[batch, 2, past_sequence_length, head] k, float[batch, 2, past_sequence_length, head] v"
DECODER = """h = Gather(E, ids) c = ReduceSum<keepdims = 0>(attention_mask, last) s = Sub(c, one) lens = Cast<to = 6>(s)
shape = Shape(attention_mask) t = Gather(shape, one) total = Cast<to = 6>(t) {projected}
a, present_k, present_v = com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>({qkv}, k, v, lens, total)
o = MatMul(a, O) n, , , u = com.microsoft.SkipSimplifiedLayerNormalization<epsilon = 0.01>(h, o, w)
f = MatMul(n, O) y = Add(u, f)"""
PACKED = {"projected": "p = MatMul(h, P)", "qkv": "p, , "}
APART = {"projected": "q = MatMul(h, O) kk = MatMul(h, K) vv = MatMul(h, K)", "qkv": "q, kk, vv"}


def decoder(layout: dict[str, str], cache: str = CACHE) -> onnx.ModelProto:
    """One layer as the model builder of onnxruntime-genai writes it, with a size of a head that only the key says."""
    made = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]> '
        f"g (int64[batch, sequence_length] ids, int64[batch, total_sequence_length] attention_mask, {cache}) => "
        f"(float[batch, sequence_length, {WIDTH}] y) {{ {DECODER.format(**layout)} }}")  # fmt: skip
    rng = np.random.default_rng(2)
    sizes = {"E": (20, WIDTH), "P": (WIDTH, 8 * HEAD), "O": (WIDTH, WIDTH), "K": (WIDTH, 2 * HEAD), "w": (WIDTH,)}
    weights = {n: rng.uniform(-0.5, 1.0, s).astype("f4") for n, s in sizes.items()}
    weights |= {"last": np.array([-1]), "one": np.array(1)}
    made.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in weights.items())
    return made


@pytest.mark.parametrize("layout", [PACKED, APART], ids=["packed", "apart"])
def test_a_decoder_with_a_cache_runs_on_random_inputs(layout: dict[str, str], tmp_path: Path) -> None:
    source, out = saved(decoder(layout), tmp_path / "in.onnx"), tmp_path / "out.onnx"
    sizes = head_sizes(read_onnx(source)[0])
    assert sizes == {"head": HEAD}
    feeds = run_random(session(source), None, sizes=sizes)[0]
    assert {name: array.shape for name, array in feeds.items()} == {
        "ids": (2, 2), "attention_mask": (2, 2), "k": (2, 2, 0, HEAD), "v": (2, 2, 0, HEAD)}  # fmt: skip
    assert (feeds["attention_mask"] == 1).all()
    report = normfuse.rewrite(source, out, normfuse.Config(target="ort-cpu", ort_version="1.31", verify="model"))
    assert [(n.kind, n.action, n.verified) for n in report.norms] == [("rms_norm", "fused", True)]
    assert compare_models(source, out)["equal"]
    code, printed, _ = run("bench", source, "--rounds", "3", "--size", "sequence_length=3", "--size",
                           "total_sequence_length=3")  # fmt: skip
    assert code == 0 and "sizes not given: batch 2, past_sequence_length 0, head 8; give" in printed


@pytest.mark.parametrize("cache", [
    CACHE.replace("head", "8"),  # stated
    CACHE.replace("2, past_sequence_length, head", "past_sequence_length, 2, 8"),  # a name, but no head's
], ids=["stated", "elsewhere"])  # fmt: skip
def test_only_open_sizes_of_heads_are_read_off_the_key(cache: str, tmp_path: Path) -> None:
    assert head_sizes(read_onnx(saved(decoder(PACKED, cache), tmp_path / "in.onnx"))[0]) == {}


def test_an_output_that_differs_is_told_with_a_cache(tmp_path: Path) -> None:
    made = decoder(PACKED)
    paths = [saved(made, tmp_path / "in.onnx")]
    (scale,) = (t for t in made.graph.initializer if t.name == "w")
    scale.CopyFrom(onnx.numpy_helper.from_array(1.01 * onnx.numpy_helper.to_array(scale), "w"))
    paths.append(saved(made, tmp_path / "other.onnx"))
    assert not compare_models(*paths)["equal"]


def small(inputs: str, lines: str, **constants: Any) -> onnx.ModelProto:
    made = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g ({inputs}) => (float y) {{ {lines} }}')
    made.graph.output[0].type.tensor_type.ClearField("shape")
    made.graph.initializer.extend(onnx.numpy_helper.from_array(np.array(a), n) for n, a in constants.items())
    return made


def test_a_cache_that_may_not_be_empty(tmp_path: Path) -> None:
    made = small("float[N, 1, past_length, 1] k, float[N, 1, 1] x", "h = Gather<axis = 2>(k, one) y = Add(h, x)", one=1)
    feeds = run_random(session(saved(made, tmp_path / "in.onnx")), None)[0]
    assert feeds["k"].shape == (2, 1, 2, 1)


def test_an_empty_output_says_little(tmp_path: Path) -> None:
    made = small("float[N, 1, past_length, 1] k", "y = Relu(k)")
    feeds, (y,) = run_random(session(saved(made, tmp_path / "in.onnx")), None)
    assert feeds["k"].shape == y.shape == (2, 1, 2, 1)
    made = small("float[N, 1, past_length, 1] k", "h = Slice(k, none, none) y = Relu(h)", none=[0])
    assert run_random(session(saved(made, tmp_path / "in.onnx")), None)[1][0].size == 0


def test_a_model_that_runs_on_no_sizes_says_so(tmp_path: Path) -> None:
    source = saved(small("float[N] x", "y = Reshape(x, sizes)", sizes=[3, 7]), tmp_path / "in.onnx")
    with pytest.raises(InputError, match="do not run on these inputs"):
        compare_models(source, source)


def shapes(known: dict[str, int], sizes: tuple[int, int, int], **inputs: list[Any]) -> dict[str, tuple[int, ...]]:
    given = [SimpleNamespace(name=name, shape=shape) for name, shape in inputs.items()]
    return shapes_for(SimpleNamespace(get_inputs=lambda: given), known, sizes)


def test_sizes_that_are_open() -> None:
    assert shapes({}, (1, 7, 0), x=["batch", "s", 8, None], y=[None, "batch"], n=[]) == {
        "x": (1, 7, 8, 7), "y": (1, 1), "n": ()}  # fmt: skip


def test_what_is_past() -> None:
    cache = ["batch", 2, "past_length", 8]
    assert shapes({}, (2, 3, 0), k=cache)["k"] == (2, 2, 0, 8)
    assert shapes({}, (2, 3, 5), k=cache, lengths=["past_length"]) == {"k": (2, 2, 5, 8), "lengths": (5,)}
    assert shapes({}, (2, 3, 0), past_key_values_0_key=["b", 2, "s88", "d"])["past_key_values_0_key"] == (2, 2, 0, 3)
    assert shapes({}, (2, 3, 0), k=["b", 2, "s88", 8])["k"] == (2, 2, 3, 8)
    assert shapes({}, (2, 3, 0), past_values=["batch", "past_length", 8])["past_values"] == (2, 3, 8)  # a time series


def test_sums_of_sizes() -> None:
    mask, cache = ["batch", "past_sequence_length + sequence_length"], ["batch", 2, "past_sequence_length", 8]
    ids = ["batch", "sequence_length"]
    assert shapes({}, (2, 3, 0), mask=mask, ids=ids, k=cache) == {"mask": (2, 3), "ids": (2, 3), "k": (2, 2, 0, 8)}
    assert shapes({"past_sequence_length": 5}, (2, 3, 0), mask=mask, k=cache)["mask"] == (2, 8)
    assert shapes({mask[1]: 4}, (2, 3, 0), mask=mask, k=cache)["mask"] == (2, 4)
    assert shapes({}, (2, 3, 0), mask=["batch", "past_sequence_length + 1"], k=cache)["mask"] == (2, 1)
    assert shapes({}, (2, 3, 0), mask=["batch", "2*s0 + 1"])["mask"] == (2, 3)  # no sum of two sizes


@pytest.mark.parametrize(("inputs", "lines", "outputs"), [
    ("bfloat16[B,16] i", "x = Cast<to = 1>(i) y = Neg(x)", "float[B,16] y"),
    ("bfloat16 i", "x = Cast<to = 1>(i) y = Neg(x)", "float y"),
    ("float[B,16] x", "z = Neg(x) y = Cast<to = 16>(z)", "bfloat16[B,16] y"),
    ("float[B,2,16] x, float[B,0,16] p", "y = Concat<axis = 1>(p, x)", "float[B,2,16] y"),
    ("float[B,16] x, float t", "y = Mul(x, t)", "float[B,16] y"),
    ("float[B,16] x, int64 t", "f = Cast<to = 1>(t) y = Mul(x, f)", "float[B,16] y"),
])  # fmt: skip
def test_inputs_that_numpy_or_random_numbers_have_no_plain_form_of(inputs: str, lines: str, outputs: str,
                                                                   tmp_path: Path) -> None:  # fmt: skip
    """bfloat16, no elements, no axes: the models run, and their outputs are those of ONNX's own evaluator."""
    text = f'<ir_version: 10, opset_import: ["": 18]> g ({inputs}) => ({outputs}) {{ {lines} }}'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "a.onnx")
    feeds, _, (got,), _, _ = run_both(tmp_path / "a.onnx", tmp_path / "a.onnx", seed=0, inputs=None)
    (want,) = map(np.asarray, ReferenceEvaluator(str(tmp_path / "a.onnx")).run(None, feeds))
    assert got.dtype == want.dtype and got.shape == want.shape and got.size
    np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))
    assert bench([str(tmp_path / "a.onnx")], How(rounds=3))["models"]
    wide = {name: a.astype(np.float32) if a.dtype.name == "bfloat16" else a for name, a in feeds.items()}
    np.testing.assert_array_equal(session(tmp_path / "a.onnx").run(None, wide)[0], got)
