"""Sizes and inputs that the user gives, for models that do not run on random ones: `--size` and `--inputs`, `how=`."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from shutil import copy
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch._subclasses import FakeTensorMode

import normfuse
from normfuse import Config
from normfuse.bench import How
from normfuse.convert import Edits
from normfuse.errors import InputError
from normfuse.first import _longer, cuda
from normfuse.onnx_export import _arguments
from normfuse.sessions import Given
from normfuse.verify import compare_models
from tests.cli_tools import fails, program, run, saved
from tests.converted import D, model, numbers

fake: Any = FakeTensorMode().from_tensor
GROUPS = 11
"""No size that is tried is a multiple of it."""
NORM = """{y}m = ReduceMean<axes=[-1]>({x}) {y}d = Sub({x}, {y}m) {y}q = Mul({y}d, {y}d)
{y}v = ReduceMean<axes=[-1]>({y}q)
{y}e = Add({y}v, eps) {y}r = Sqrt({y}e) {y}n = Div({y}d, {y}r) {y}w = Mul({y}n, g) {y} = Add({y}w, b)"""
EXACT = Config("exact", verify="model")


def grouped(path: Path) -> Path:
    """h + f(norm(h)) and a norm of that, which all read tokens in groups."""
    lines = f"""q = Reshape(x, groups) h = MatMul(q, w) {NORM.format(y='n', x='h')} f = MatMul(n, w)
    h1 = Add(h, f) {NORM.format(y='y', x='h1')}"""
    groups = np.array([-1, GROUPS, D])
    return saved(model(f"float[B,S,{D}] x", lines, opset=13, groups=groups, w=numbers(D, D)), path)


def subtractions(path: Path) -> int:
    """How many means are still taken away."""
    return sum(n.op_type in ("Sub", "layer_norm") for n in onnx.load(path).graph.node)


def shaped(path: Path) -> Path:
    """Norms of x in a shape that is an input, and that no random numbers are."""
    lines = f"""q = Reshape(x, shape) h = MatMul(q, w) {NORM.format(y='n', x='h')} f = MatMul(n, w)
    h1 = Add(h, f) {NORM.format(y='y', x='h1')}"""
    return saved(model("float[N] x, int64[2] shape", lines, opset=13, w=numbers(D, D)), path)


def test_sizes(tmp_path: Path) -> None:
    source, out = grouped(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    line = fails(run("rewrite", source, out, "--verify", "model"))
    assert f"drawn were x 2x2x{D}, and others: give --inputs FILE.npz, or --size NAME=N" in line and not out.exists()
    code, printed, _ = run("rewrite", source, out, "--layernorm-to-rmsnorm", "exact", "--json")
    told = json.loads(printed)["refusals"]
    assert code == 0 and {r["code"] for r in told} == {"NF304"} and "could not run" in told[0]["message"]
    size = ("--size", f"S={GROUPS}")
    assert subtractions(out) == 2
    assert run("rewrite", source, out, "--layernorm-to-rmsnorm", "exact", "--overwrite", *size)[0] == 0
    assert subtractions(out) == 0
    line = fails(run("verify", source, out))
    assert "do not run on these inputs" in line and "--size NAME=N" in line
    assert run("verify", source, out, *size)[0] == 0
    assert compare_models(source, out, sizes={"S": GROUPS, "B": 3})["outputs"][0]["shape"] == [3, GROUPS, D]
    report = normfuse.rewrite(source, tmp_path / "b.onnx", EXACT, how=How(sizes={"S": GROUPS}))
    assert report.converted == 2 and report.model_check and report.model_check["equal"]
    assert "'S': 11" in report.replay
    out.unlink()
    eval(report.replay.replace("b.onnx", "out.onnx"), {"normfuse": normfuse})
    assert out.read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_inputs(tmp_path: Path) -> None:
    source, out, given = shaped(tmp_path / "in.onnx"), tmp_path / "out.onnx", tmp_path / "inputs.npz"
    fails(run("rewrite", source, out, "--verify", "model"))
    assert run("rewrite", source, out, "--layernorm-to-rmsnorm", "exact", "--strict")[0] == 1
    np.savez(given, shape=np.array([5, D]), x=numbers(5 * D))
    options = ("--layernorm-to-rmsnorm", "exact", "--verify", "model", "--inputs", given, "--strict", "--overwrite")
    code, printed, said = run("rewrite", source, out, *options)
    assert code == 0, printed + said
    assert subtractions(out) == 0
    assert run("verify", source, out, "--inputs", given)[0] == 0
    _, report = normfuse.optimize(onnx.load(source), Config("exact"), how=How(inputs=given))
    assert report.converted == 2
    assert not normfuse.optimize(onnx.load(source), Config("exact"))[1].converted
    np.savez(given, shape=np.array([5, D]))  # x is drawn, as large as the size that is given
    assert run("rewrite", source, out, *options, "--size", f"N={5 * D}")[0] == 0


def test_a_certificate_on_given_inputs_sees_a_wrong_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shaped(tmp_path / "in.onnx")
    np.savez(tmp_path / "inputs.npz", shape=np.array([5, D]), x=numbers(5 * D))
    monkeypatch.setattr("normfuse.frontends.onnx_convert.Edits.centre", lambda self, name, *more: None)
    report = normfuse.optimize(onnx.load(source), Config("exact"), how=How(inputs=tmp_path / "inputs.npz"))[1]
    assert not report.converted and all(r.code == "NF304" and "differ by" in r.message for r in report.refusals)


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Weights of which the edit does nothing."""
    names, own = list[str](), Edits._set

    def forget(self: Edits, name: str, source: str, edit: Any) -> None:
        own(self, name, source, (lambda array, give: array) if name in names else edit)

    monkeypatch.setattr(Edits, "_set", forget)
    return names


@pytest.mark.parametrize("weight", ["wq", "wk"])
def test_what_is_given_hides_no_wrong_edit(weight: str, forgotten: list[str], tmp_path: Path) -> None:
    """A softmax of one token gives 1, whatever that is."""
    lines = f"""h = MatMul(x, w) {NORM.format(y='n', x='h')} q0 = MatMul(n, wq) {NORM.format(y='q', x='q0')}
    k0 = MatMul(n, wk) {NORM.format(y='k', x='k0')} v = MatMul(n, wv) kt = Transpose<perm=[0,2,1]>(k)
    s = MatMul(q, kt) a = Softmax<axis=-1>(s) o = MatMul(a, v) y = MatMul(o, wo)"""
    made = model(f"float[B,S,{D}] x", lines, opset=13, w=numbers(D, D), wq=numbers(D, D), wk=numbers(D, D),
                 wv=numbers(D, D), wo=numbers(D, D))  # fmt: skip
    np.savez(tmp_path / "inputs.npz", x=numbers(2, 1, D))
    for how in (How(sizes={"S": 1}), How(inputs=tmp_path / "inputs.npz")):
        forgotten[:] = []
        assert normfuse.optimize(made, Config("exact"), how=how)[1].converted == 3
        forgotten[:] = [weight]
        report = normfuse.optimize(made, Config("exact"), how=how)[1]
        assert not report.converted and "differ by" in report.refusals[0].message


def test_floats_that_are_given_hide_no_wrong_edit(forgotten: list[str], tmp_path: Path) -> None:
    """Zeros are what no weight is seen on."""
    made = onnx.load(shaped(tmp_path / "in.onnx"))
    bias = onnx.helper.make_node("Add", ["h_w", "c"], ["h"])
    made.graph.node[1].output[0] = "h_w"
    made.graph.node.insert(2, bias)
    made.graph.initializer.append(onnx.numpy_helper.from_array(numbers(D), "c"))
    np.savez(tmp_path / "inputs.npz", shape=np.array([5, D]), x=np.zeros(5 * D, np.float32))
    how = How(inputs=tmp_path / "inputs.npz")
    assert normfuse.optimize(made, Config("exact"), how=how)[1].converted == 2
    forgotten.append("w")
    report = normfuse.optimize(made, Config("exact"), how=how)[1]
    assert not report.converted and "differ by" in report.refusals[0].message


def test_a_single_number_is_given_in_any_shape(tmp_path: Path) -> None:
    lines = f"h = Mul(x, s) {NORM.format(y='y', x='h')}"
    source = saved(model(f"float[B,{D}] x, float[] s", lines, opset=13), tmp_path / "in.onnx")
    made = onnx.load(source)
    made.graph.input[1].type.tensor_type.shape.SetInParent()
    onnx.save(made, source)
    for shape in ((), (1,)):
        assert compare_models(source, source, inputs={"s": np.ones(shape, np.float32)})["equal"]


def test_no_rows_that_are_given_take_no_conversion_away(tmp_path: Path) -> None:
    lines = f"h = MatMul(x, w) {NORM.format(y='n', x='h')} y = MatMul(n, w2)"
    made = model(f"float[B,{D}] x", lines, opset=13, w=numbers(D, D), w2=numbers(D, D))
    np.savez(tmp_path / "inputs.npz", x=np.zeros((0, D), np.float32))
    assert normfuse.optimize(made, Config("exact"), how=How(inputs=tmp_path / "inputs.npz"))[1].converted == 1


@pytest.mark.parametrize("inside", ["then", "other"])
def test_branches_on_what_is_given(inside: str, tmp_path: Path) -> None:
    """The certificates of the ways through an If are made on it too, and so is that without the branches."""
    norm = f"{NORM.format(y='n', x='h')} o = MatMul(n, w)"
    plain = {"then": "o = Tanh(h)", "other": "t = Tanh(h) o = Clip(t)"}
    other = plain[inside] if inside == "then" else f"n0 = Neg(h) {NORM.format(y='n', x='n0')} o = MatMul(n, w)"
    lines = f"""q = Reshape(x, shape) h = MatMul(q, w) {NORM.format(y='m', x='h')} k = MatMul(m, w)
    r = If (flag) <then_branch = t () => (float[] o) {{ {norm} }}, else_branch = e () => (float[] o) {{ {other} }}>
    y = Add(k, r)"""
    made = model("float[N] x, int64[2] shape, bool flag", lines, opset=13, w=numbers(D, D))
    made.graph.input[2].type.tensor_type.shape.SetInParent()
    np.savez(tmp_path / "inputs.npz", shape=np.array([5, D]), x=numbers(5 * D), flag=np.array(True))
    report = normfuse.optimize(made, Config("exact"), how=How(inputs=tmp_path / "inputs.npz"))[1]
    assert report.converted == (2 if inside == "then" else 3), report.refusals
    assert not normfuse.optimize(made, Config("exact"))[1].converted


def test_what_hides_the_norms_on_random_inputs(tmp_path: Path) -> None:
    """Nothing that is drawn is negative all over, and other numbers have no root."""
    lines = f"""top = ReduceMax<keepdims=0>(x) low = Neg(top) root = Sqrt(low) zero = Sub(root, root)
    h = MatMul(x, w) {NORM.format(y='n', x='h')} f = MatMul(n, w) h1 = Add(h, f) {NORM.format(y='l', x='h1')}
    y = Add(l, zero)"""
    source = saved(model(f"float[5,{D}] x", lines, opset=13, w=numbers(D, D)), tmp_path / "in.onnx")
    assert "hide the norms" in normfuse.optimize(onnx.load(source), Config("exact"))[1].refusals[0].message
    np.savez(tmp_path / "inputs.npz", x=-np.abs(numbers(5, D)))
    how = How(inputs=tmp_path / "inputs.npz")
    assert normfuse.optimize(onnx.load(source), Config("exact"), how=how)[1].converted == 2


def test_a_model_that_an_optimiser_had_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its outputs are compared on what is given."""
    def attempt(tool: str, source: Path, target: Path, _: object) -> str:
        made = onnx.load(source)
        made.graph.node[-1].op_type = kinds[0]
        onnx.save(made, target)
        return ""

    monkeypatch.setattr("normfuse.first._attempt", attempt)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    lines = f"q = Reshape(x, groups) {NORM.format(y='n', x='q')} y = Add(n, q)"
    source = saved(model(f"float[B,S,{D}] x", lines, opset=13, groups=np.array([-1, GROUPS, D])), tmp_path / "in.onnx")
    out = tmp_path / "out.onnx"
    kinds, how = ["Add"], How(sizes={"S": GROUPS})
    said = normfuse.rewrite(source, out, Config(first="onnxsim")).notes[0]
    assert said.startswith("onnxsim did not go first: ") and "do not run on these inputs" in said
    said = normfuse.rewrite(source, out, Config(first="onnxsim"), how=how, overwrite=True).notes[0]
    assert said.startswith("onnxsim went first: ") and said.endswith("outputs equal")
    assert "how=" in normfuse.rewrite(source, out, Config(first="onnxsim"), how=how, overwrite=True).replay
    monkeypatch.setattr("normfuse.cli_env.sessions_have", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr("normfuse.sessions.PROVIDERS", {"cuda": "CPUExecutionProvider", "cpu": "CPUExecutionProvider"})
    assert cuda(source, Given(sizes={"S": GROUPS})) == "" != cuda(source, Given())
    kinds[0] = "Sub"
    said = normfuse.rewrite(source, out, Config(first="onnxsim"), how=how, overwrite=True).notes[0]
    assert said.startswith("onnxsim did not go first: its result: output 'y' differs")


def test_longer_inputs_where_sizes_are_left_open(tmp_path: Path) -> None:
    """Also beside inputs that are given; none where all sizes are."""
    lines = f"q = Reshape(x, groups) {NORM.format(y='y', x='q')}"
    source = saved(model(f"float[B,S,{D}] x", lines, opset=13, groups=np.array([-1, GROUPS, D])), tmp_path / "in.onnx")
    assert _longer(source, Given({}, {"S": 11, "B": 2})) == []
    assert [a.shape for a in _longer(source, Given({"x": numbers(2, GROUPS, D)}))[0].inputs.values()] == [(1, 33, D)]
    assert [a.shape for a in _longer(source, Given({}, {"S": 2 * GROUPS}))[0].inputs.values()] == [(1, 22, D)]


class Halves(torch.nn.Module):
    """Rows that numpy has no type for, with a norm in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(x.float())
        return y


def test_arguments_of_bfloat16(tmp_path: Path) -> None:
    report = normfuse.export(Halves(), (torch.randn(2, D).bfloat16(),), tmp_path / "o.onnx", Config(verify="model"))
    assert report.model_check and report.model_check["equal"]


class Picked(torch.nn.Module):
    """Runs where one input says where the other has a number."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.head = torch.nn.Linear(D, D), torch.nn.LayerNorm(D), torch.nn.Linear(D, D)

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        rows = self.inner(x)[at + 40]  # 0 and 1 are beyond the last one
        y: torch.Tensor = self.head(self.norm(rows))
        return y


def test_arguments_are_what_a_certificate_is_made_on(tmp_path: Path) -> None:
    args = (torch.randn(4, D), torch.tensor([-40, -37, -38]))
    report = normfuse.export(Picked().eval(), args, tmp_path / "o.onnx", EXACT)
    assert report.converted == 1 and report.model_check and report.model_check["equal"]
    np.savez(tmp_path / "inputs.npz", at=np.array([-40, -40, -39]))
    how = How(inputs=tmp_path / "inputs.npz")
    assert normfuse.export(Picked().eval(), args, tmp_path / "p.onnx", EXACT, how=how).converted == 1
    with pytest.raises(InputError, match="no input is named 'of'"):
        np.savez(tmp_path / "inputs.npz", of=np.array([-40]))
        normfuse.export(Picked().eval(), args, tmp_path / "q.onnx", EXACT, how=how)
    assert not (tmp_path / "q.onnx").exists()


ODD: dict[str, Callable[[], Any]] = {
    "float8": lambda: torch.ones(4, D).to(torch.float8_e4m3fn), "meta": lambda: torch.ones(4, D, device="meta"),
    "sparse": lambda: torch.ones(4, D).to_sparse(), "fake": lambda: fake(torch.ones(4, D)),
    "another rank": lambda: torch.ones(3, 2, D), "another type": lambda: torch.ones(4, D, dtype=torch.int64),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_arguments_that_are_no_inputs(kind: str, tmp_path: Path) -> None:
    """A program that was exported before is certified on random inputs then."""
    module = torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.LayerNorm(D), torch.nn.Linear(D, D)).eval()
    made = torch.onnx.export(module, (torch.randn(4, D),), dynamo=True, verbose=False)
    for config in (EXACT, Config("exact")):
        assert normfuse.export(made, (ODD[kind](),), tmp_path / "o.onnx", config, overwrite=True).converted == 1


class Two(torch.nn.Module):
    """Takes inputs of two shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = torch.nn.Linear(D, D), torch.nn.Linear(D, D), torch.nn.LayerNorm(D)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(self.one(a) + self.two(b)[:1]) * 2
        return y


def test_arguments_in_another_order(tmp_path: Path) -> None:
    kwargs = {"a": torch.randn(4, D), "b": torch.randn(1, D)}
    made: Any = torch.export.export(Two().eval(), (), kwargs)
    turned = dict(reversed(kwargs.items()))
    report = normfuse.export(made, (), tmp_path / "o.onnx", EXACT, kwargs=turned)
    assert report.converted == 1 and report.model_check and report.model_check["equal"]
    made = torch.onnx.export(Two().eval(), (), kwargs=kwargs, dynamo=True, verbose=False)
    found = _arguments(made, (), turned)
    assert list(found) == ["a", "b"] and all((found[name] == kwargs[name].numpy()).all() for name in found)
    assert _arguments(made, (), {"a": kwargs["a"].requires_grad_(), "b": kwargs["b"].bfloat16()}).keys() == {"a", "b"}
    assert _arguments(made, (), {"a": kwargs["b"], "b": kwargs["a"]}) == _arguments(made, (), {"c": kwargs["a"]}) == {}
    several: list[Any] = [(kwargs["a"],), (kwargs["a"], kwargs["b"], kwargs["b"]), None, kwargs["a"]]
    for args in several:
        assert normfuse.export(made, args, tmp_path / "o.onnx", EXACT, overwrite=True).converted == 1


@pytest.mark.parametrize("first", ["onnxsim", "fastest"])
def test_an_optimiser_of_an_export_is_compared_on_its_arguments(first: str, tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    own = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: name == "onnxsim" or own(name, *more))
    monkeypatch.setattr("normfuse.first._attempt", lambda tool, source, target, _: str(copy(source, target))[:0])
    monkeypatch.setattr("normfuse.fastest.RESTARTS", 1)
    monkeypatch.setattr("normfuse.fastest.SECONDS", 0.01)
    args = (torch.randn(4, D), torch.tensor([-40, -37, -38]))
    report = normfuse.export(Picked().eval(), args, tmp_path / "o.onnx", Config(first=first, verify="model"))
    assert not any("did not go first" in note for note in report.notes) and report.model_check
    np.savez(tmp_path / "inputs.npz", at=np.array([100, 100, 100]))
    how = How(inputs=tmp_path / "inputs.npz")
    with pytest.raises(InputError, match=r"q\.onnx: (the export does not|verify='model': the models do not) run"):
        normfuse.export(Picked().eval(), args, tmp_path / "q.onnx", Config(first=first, verify="model"), how=how)
    assert not (tmp_path / "q.onnx").exists()


def test_the_fastest_is_rewritten_on_what_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normfuse.fastest.RESTARTS", 1)
    monkeypatch.setattr("normfuse.fastest.SECONDS", 0.01)
    monkeypatch.setattr("normfuse.fastest._File.faster", lambda self, other: self.first is not None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    source, out = grouped(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    report = normfuse.rewrite(source, out, Config("exact", first="fastest"), how=How(sizes={"S": GROUPS}, threads=1))
    assert report.converted == 2 and subtractions(out) == 0 and report.fastest
    line = fails(run("rewrite", source, out, "--first", "fastest", "--size", "S=12", "--overwrite"))
    assert "does not run on random inputs, S=12: " in line and "--inputs FILE.npz" in line


@pytest.mark.parametrize(("options", "said"), [
    (["--size", "S=11"], "--size is to run models with, and none is run: it takes --verify model, --layernorm-to-rms"),
    (["--inputs", "in.npz"], "--inputs is to run models with, and none is run"),
    (["--verify", "off", "--layernorm-to-rmsnorm", "exact", "--size", "S=11"], "and none is run"),
    (["--verify", "model", "--size", "T=11"], "no size of an input is named 'T'; the model has B, S"),
    (["--verify", "model", "--size", "S=x"], "--size S=x: give a name and a size"),
    (["--verify", "model", "--inputs", "gone.npz"], "gone.npz"),
    (["--layernorm-to-rmsnorm", "exact", "--inputs", "in.npz", "--size", "S=12"],
     "the size 'S' is that of input 'x', which is given; leave out --size S=12, or --inputs"),
    (["--verify", "model", "--inputs", "other.npz"], "no input is named 'z'; the model has x"),
    (["--layernorm-to-rmsnorm", "exact", "--inputs", "short.npz"],
     f"input 'x' is given with shape 2x11x1, and the model wants BxSx{D}"),
    (["--layernorm-to-rmsnorm", "exact", "--inputs", "flat.npz"],
     f"input 'x' is given with shape 2x{D}, and the model wants BxSx{D}"),
    (["--layernorm-to-rmsnorm", "exact", "--inputs", "wide.npz"],
     "input 'x' is given in float64, and the model wants float32"),
    (["--verify", "model", "--inputs", "twelve.npz"], "do not run on these inputs"),
])  # fmt: skip
def test_what_does_not_fit(options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    grouped(tmp_path / "in.onnx")
    np.savez("in.npz", x=numbers(2, GROUPS, D))
    np.savez("other.npz", z=numbers(2, GROUPS, D))
    np.savez("short.npz", x=numbers(2, GROUPS, 1))
    np.savez("flat.npz", x=numbers(2, D))
    np.savez("wide.npz", x=numbers(2, GROUPS, D, dtype=np.float64))
    np.savez("twelve.npz", x=numbers(2, 12, D))
    assert said in fails(run("rewrite", "in.onnx", "out.onnx", *options))
    assert not Path("out.onnx").exists()


def test_programs_have_inputs_of_their_own(tmp_path: Path) -> None:
    path = program(tmp_path / "in.pt2")
    assert "--size is for ONNX models" in fails(run("verify", path, path, "--trust", "--size", "S=2"))
    line = fails(run("rewrite", path, tmp_path / "out.pt2", "--trust", "--verify", "model", "--size", "S=2"))
    assert "this is a .pt2" in line
    with pytest.raises(InputError, match="how= is for ONNX models"):
        normfuse.optimize(torch.export.load(path), how=How(sizes={"S": 2}))


def test_how_says_what_nothing_asks_for(tmp_path: Path) -> None:
    source, how = grouped(tmp_path / "in.onnx"), How(sizes={"S": GROUPS})
    for config in (Config(), Config("exact", verify="off")):
        with pytest.raises(InputError, match="how= says on what models are run, and none is; it takes verify='model'"):
            normfuse.rewrite(source, tmp_path / "o.onnx", config, how=how)
        with pytest.raises(InputError, match="how= says on what models are run"):
            normfuse.optimize(source, config, how=how)
    with pytest.raises(InputError, match="no size of an input is named 'T'"):
        normfuse.optimize(source, Config("exact"), how=How(sizes={"T": 2}))
