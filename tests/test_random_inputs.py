"""Random inputs that a model runs on: what its sizes are where it leaves them open."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import normfuse
from normfuse.bench import How, bench
from normfuse.cli_report import comparison_blocks
from normfuse.errors import InputError, UnsupportedError
from normfuse.frontends.onnx_certify import input_shapes, inputs_for
from normfuse.frontends.onnx_open import stated_sizes
from normfuse.frontends.onnx_wide import compare_rewritten
from normfuse.io.files import read_onnx
from normfuse.reduce import _difference
from normfuse.sessions import Given, feeds_for, longest, run_random, session, shapes_for
from normfuse.verify import compare_models, compare_outputs, demand_compared, demand_equal, difference, run_both
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
    sizes = stated_sizes(read_onnx(source)[0])
    assert sizes == {"head": HEAD}
    feeds = run_random(session(source), None, sizes=[sizes])[0]
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
    assert stated_sizes(read_onnx(saved(decoder(PACKED, cache), tmp_path / "in.onnx"))[0]) == {}


@pytest.mark.parametrize(("attributes", "room"), [
    ("sliding_window_cache = 1, local_window_size = 5", 5), ("local_window_size = 5", 0),
    ("sliding_window_cache = 1", 0)])  # fmt: skip
def test_a_cache_for_a_sliding_window_has_room_for_it(attributes: str, room: int, tmp_path: Path) -> None:
    """As onnxruntime-genai builds Gemma 2: ONNX Runtime takes no cache of fewer tokens than the window has."""
    made = decoder(PACKED, CACHE.replace("past_sequence_length", "past_sliding_length"))
    (attention,) = (n for n in made.graph.node if n.op_type == "GroupQueryAttention")
    for name, value in (pair.split(" = ") for pair in attributes.split(", ")):
        attention.attribute.append(onnx.helper.make_attribute(name, int(value)))
    source = saved(made, tmp_path / "in.onnx")
    sizes = stated_sizes(read_onnx(source)[0])
    assert sizes == {"head": HEAD} | ({"past_sliding_length": room} if room else {})
    if "local" in attributes:
        assert run_random(session(source), None, sizes=[sizes])[0]["k"].shape == (2, 2, room, HEAD)
        assert compare_models(source, source)["equal"]


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


# -- outputs that say nothing -----------------------------------------------------------------------------------------


def features(inner: str, factor: float, folder: Path) -> Path:
    """An RMSNorm of what `inner` makes of x, times a factor."""
    made = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["": 18]> g (float[T,16] x) => (float[T,16] y) {{ {inner} q = Mul(l, l) '
        "m = ReduceMean(q, last) e = Add(m, eps) s = Sqrt(e) n = Div(l, s) y = Mul(n, w) }")  # fmt: skip
    held = {"last": np.array([-1]), "eps": np.float32(1e-6), "one": np.float32(1), "w": np.full(16, factor, np.float32)}
    made.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in held.items())
    return saved(made, folder / f"{factor}.onnx")


LOG, ARC = "l = Log(x)", "d = Sub(one, x) p = Log(d) z = Log(x) l = Add(p, z)"
NEVER = "t = Mul(x, x) u = Neg(t) l = Log(u)"


@pytest.mark.parametrize("inner", [LOG, ARC])
def test_a_model_of_positive_inputs_is_compared_on_such(inner: str, tmp_path: Path) -> None:
    a, b = features(inner, 1.0, tmp_path), features(inner, -5.0, tmp_path)
    code, printed, _ = run("verify", a, b)
    assert code == 1 and "differs by 6 of" in printed
    report = normfuse.rewrite(a, tmp_path / "out.onnx", normfuse.Config(verify="model"))
    assert report.fused == 1 and report.model_check and report.model_check["equal"]
    assert np.isfinite(longest(session(a), (3,), 1)["x"]).all()  # type: ignore[index]


class Picky:
    """A session that gives nothing finite, and does not run on positive numbers."""

    def get_inputs(self) -> Any:
        return [SimpleNamespace(name="x", shape=[3], type="tensor(float)")]

    def run(self, wanted: Any, feeds: dict[str, Any]) -> Any:
        if (feeds["x"] > 0).all():
            raise RuntimeError("too large")
        return [np.full(3, np.nan, np.float32)]


def test_other_inputs_that_do_not_run_are_passed_over() -> None:
    feeds, (output,) = run_random(Picky(), None, seed=3)
    assert (feeds["x"] < 0).any() and np.isnan(output).all()


def test_reduce_takes_positive_inputs_too(tmp_path: Path) -> None:
    a, b = (onnx.load(features(LOG, factor, tmp_path)) for factor in (1.0, -5.0))
    found = _difference(a, b, normfuse.Config(), tmp_path)
    assert found is not None and found.kind == "different" and _difference(a, a, normfuse.Config(), tmp_path) is None


def test_outputs_without_a_finite_element_are_not_called_equal(tmp_path: Path) -> None:
    a, b = features(NEVER, 1.0, tmp_path), features(NEVER, -5.0, tmp_path)
    code, _, said = run("verify", a, b)
    assert code == 2 and "output 'y' has no finite element on the inputs tried; give --inputs" in said
    code, _, said = run("rewrite", a, tmp_path / "out.onnx", "--verify", "model")
    assert code == 2 and "use --verify sites" in said and not (tmp_path / "out.onnx").exists()
    with pytest.raises(InputError, match="'y' has no finite element"):
        compare_models(a, b)
    np.savez(tmp_path / "given.npz", x=-np.ones((2, 16), np.float32))
    a = features(LOG, 1.0, tmp_path)
    assert run("verify", a, a)[0] == 0
    assert run("verify", a, a, "--inputs", tmp_path / "given.npz")[0] == 2  # the inputs given are the ones to take


@pytest.mark.parametrize("none", [
    [np.full(3, np.nan, np.float32)] * 2, [[np.full(2, np.inf, np.float16)]], np.full(3, np.nan, np.complex64),
], ids=["sequence", "nested", "complex"])  # fmt: skip
def test_outputs_of_other_kinds_without_a_finite_element(none: Any) -> None:
    with pytest.raises(InputError, match="'out' has no finite element"):
        demand_compared(compare_outputs(["out"], [none], [none], 64, "cpu"))
    some = [*none, np.ones(1, np.float32)] if isinstance(none, list) else np.append(none, 1)
    demand_compared(compare_outputs(["out"], [some], [some], 64, "cpu"))


def test_what_was_not_compared_is_told() -> None:
    x = np.array([np.nan, 1.0, 2.0, 3.0], np.float32)
    none, empty = np.full(3, np.inf, np.float32), np.zeros((0, 3), np.float32)
    found = compare_outputs(["x", "empty"], [x, empty], [x, empty], 64, "cpu")
    assert found["equal"] and [o.get("not_finite") for o in found["outputs"]] == [0.25, None]
    demand_compared(found)
    printed = [str(block) for block in comparison_blocks(found, quiet=False)]
    assert "note: output 'x' is NaN or infinite in 0.25 of its elements" in printed
    assert "note: output 'empty' has no element, and was not compared" in printed
    demand_compared(compare_outputs(["x", "none"], [x, none], [x, none], 64, "cpu"))  # a mask, say
    found = compare_outputs(["empty", "none"], [empty, none], [empty, none], 64, "cpu")
    with pytest.raises(InputError, match="output 'none' has no finite element, and no other says more"):
        demand_compared(found)
    found = compare_outputs(["a", "b"], [empty, empty], [empty, empty], 64, "cpu")
    with pytest.raises(InputError, match="output 'a' has no element, and no other says more"):
        demand_equal(found, "in.onnx")
    assert not compare_outputs(["none"], [none], [np.zeros(3, np.float32)], 64, "cpu")["equal"]


def test_programs_without_a_finite_output_are_not_called_equal(tmp_path: Path) -> None:
    class Log(torch.nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.rms_norm(x.log(), (8,)) * self.factor

    paths = [tmp_path / "a.pt2", tmp_path / "b.pt2"]
    for path, factor in zip(paths, (1.0, -5.0), strict=True):
        torch.export.save(torch.export.export(Log(factor), (-torch.ones(2, 8),)), path)
    code, _, said = run("verify", *paths, "--trust")
    assert code == 2 and "has no finite element on the inputs tried; give --inputs" in said
    name = torch.export.load(paths[0]).graph_signature.user_inputs[0]
    given: dict[str, Any] = {str(name): np.full((2, 8), np.e, np.float32)}
    np.savez(tmp_path / "given.npz", **given)
    assert run("verify", *paths, "--trust", "--inputs", tmp_path / "given.npz")[0] == 1


def test_a_file_without_arrays_is_no_inputs(tmp_path: Path) -> None:
    source = features(LOG, 1.0, tmp_path)
    np.savez(tmp_path / "none.npz")
    for command in (["verify", source, source], ["bench", source]):
        code, _, said = run(*command, "--inputs", tmp_path / "none.npz")
        assert code == 2 and "none.npz holds no arrays; make it with" in said


# -- sizes ------------------------------------------------------------------------------------------------------------


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
    encoder = ["batch", 2, "encoder_length", 8]  # what its decoder reads of the encoder's tokens is not past
    found = shapes({}, (2, 3, 0), hidden=["batch", "encoder_length", 16], past_encoder_key=encoder, past_key=cache)
    assert found == {"hidden": (2, 3, 16), "past_encoder_key": (2, 2, 3, 8), "past_key": (2, 2, 0, 8)}


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
    feeds, _, (got,), _, _ = run_both(tmp_path / "a.onnx", tmp_path / "a.onnx", 0, Given())
    (want,) = map(np.asarray, ReferenceEvaluator(str(tmp_path / "a.onnx")).run(None, feeds))
    assert got.dtype == want.dtype and got.shape == want.shape and got.size
    np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))
    assert bench([str(tmp_path / "a.onnx")], How(rounds=3))["models"]
    wide = {name: a.astype(np.float32) if a.dtype.name == "bfloat16" else a for name, a in feeds.items()}
    np.testing.assert_array_equal(session(tmp_path / "a.onnx").run(None, wide)[0], got)


def test_an_input_is_a_mask_by_its_name() -> None:
    """Tokens of which some were masked are none: all of them 1, they would hide what differs between rows."""
    names = ("attention_mask", "mask_1", "masked_input_ids", "unmasked", "masked_mask")
    infos = [SimpleNamespace(name=name, shape=[8, 16], type="tensor(int64)") for name in names]
    given = ", ".join(f"int64[8, 16] {name}" for name in names)
    made = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g ({given}) => (int64[8, 16] y) '
                                   f"{{ y = Concat<axis = 0>({', '.join(names)}) }}")  # fmt: skip
    proto = onnx_ir.from_proto(made)
    drawn = inputs_for(proto, input_shapes(proto, {}, (2, 8, 8)))
    for feeds in (feeds_for(SimpleNamespace(get_inputs=lambda: infos)), drawn):
        assert [name for name, array in feeds.items() if array.min() < 1] == ["masked_input_ids", "unmasked"]


def flagged(other: str, path: Path, shape: str = "[1]") -> Path:
    """A model of two branches, of which a flag takes one."""
    return saved(onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[2, 8] x, bool{shape} use_cache) => (float[2, 8] y) <int64[2] bad = {{3, 7}}> {{
        y = If (use_cache) <then_branch = t () => (float[2, 8] a) {{ a = Tanh(x) }},
                            else_branch = e () => (float[2, 8] b) {{ b = {other} }}> }}"""), path)


@pytest.mark.parametrize("shape", ["[1]", ""])
@pytest.mark.parametrize("compare", [compare_models, compare_rewritten])
def test_a_branch_that_a_flag_takes_is_compared_either_way(compare: Any, shape: str, tmp_path: Path) -> None:
    """As merged decoders have them; not where the flag is given, nor where the model itself does not run so."""
    steps = ("Relu(x)", "Neg(x)", "Relu(x)", "Reshape(x, bad)")
    one, two, same, broken = (flagged(other, tmp_path / f"{i}.onnx", shape) for i, other in enumerate(steps))
    assert (found := compare(one, same))["equal"] and found["flags"] == ["use_cache"]
    assert not (found := compare(one, two))["equal"]
    assert difference(found).endswith("of its largest element, with use_cache false")
    assert compare(one, two, inputs={"use_cache": np.full([1] * bool(shape), True)})["equal"]
    assert not compare(one, two, inputs={"use_cache": np.full([1] * bool(shape), False)})["equal"]
    assert (found := compare(broken, one))["equal"] and "flags" not in found
    with pytest.raises(InputError, match="do not run on these inputs"):
        compare(one, broken)
    code, printed, _ = run("verify", one, same)
    assert code == 0 and "note: compared with use_cache true, and false" in printed


def test_strings_are_drawn_and_sequences_are_not(tmp_path: Path) -> None:
    made = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 19]>
        g (string[B, 2] s, float[B, 8] x) => (bool[B, 2] e, float[B, 8] y) { e = Equal(s, s)
        q = Mul(x, x) m = ReduceMean(q, last) a = Add(m, eps) r = Sqrt(a) y = Div(x, r) }""")
    made.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in (
        ("last", np.array([-1])), ("eps", np.array(1e-5, np.float32))))
    path = saved(made, tmp_path / "in.onnx")
    assert compare_models(path, path)["equal"]
    made.graph.input.append(onnx.helper.make_tensor_sequence_value_info("t", onnx.TensorProto.FLOAT, ["B", 8]))
    path = saved(made, tmp_path / "seq.onnx")
    with pytest.raises(UnsupportedError, match="only tensors can be given or drawn"):
        compare_models(path, path)
    with pytest.raises(UnsupportedError, match=r"seq.onnx: verify='model': .*use verify='sites'"):
        normfuse.rewrite(path, tmp_path / "out.onnx", normfuse.Config(verify="model"))


def test_bench_says_which_branch_it_measures(tmp_path: Path) -> None:
    path = flagged("Sin(x)", tmp_path / "in.onnx")
    (note,) = [note for note in bench([str(path)], How(rounds=3))["notes"] if "use_cache" in note]
    assert note.startswith("use_cache: true;") and "--inputs" in note
    np.savez(tmp_path / "given.npz", x=np.ones((2, 8), np.float32), use_cache=np.array([True]))
    assert not any("use_cache" in n for n in bench([str(path)], How(rounds=3, inputs=tmp_path / "given.npz"))["notes"])
