"""Group normalization of one group is a LayerNorm over channels and places, with weights by channel.

And weights of rows over several axes: an operator that wants one for each element gets them only while they are few.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.fx.passes.shape_prop import ShapeProp

import normfuse
from normfuse import Config
from normfuse.frontends import onnx_emit, onnx_model
from normfuse.sessions import session

C = 8
INSTANCE = ("v = Reshape(x, rows) n = InstanceNormalization<epsilon = {eps}>(v, {one}, {zero}) "
            "m = Reshape(n, {back}) s = Mul(m, w) y = Add(s, b)")  # fmt: skip
SPELLED = ("c = ReduceMean<keepdims = 1>(x, axes) d = Sub(x, c) q = Mul(d, d) v = ReduceMean<keepdims = 1>(q, axes) "
           "e = Add(v, eps) r = Sqrt(e) n = Div(d, r) s = Mul(n, w) y = Add(s, b)")  # fmt: skip


def image(body: str, shape: str = "2,8,5,6", opset: int = 18, dtype: str = "float", more: str = "") -> onnx.ModelProto:
    """A model of an image x, with weights by channel."""
    rng = np.random.default_rng(0)
    kind = {"float": np.float32, "float16": np.float16}[dtype]
    column = [C, 1, 1]
    constants: dict[str, npt.NDArray[Any]] = {
        "w": rng.standard_normal(column).astype(kind), "b": rng.standard_normal(column).astype(kind),
        "wc": rng.standard_normal(C).astype(kind), "bc": rng.standard_normal(C).astype(kind),
        "one": np.ones(1, kind), "zero": np.zeros(1, kind), "two": np.full(1, 2, kind), "eps": np.array(1e-5, kind),
        "ones": np.ones(2, kind), "zeros": np.zeros(2, kind), "axes": np.arange(1, 4),
        "rows": np.array([0, 1, -1]), "pairs": np.array([0, 2, -1]), "whole": np.array([2, 8, 5, 6]),
    }  # fmt: skip
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> g ({dtype}[{shape}] x{more}) => '
                                    f"({dtype}[{shape}] y) {{ {body} }}")  # fmt: skip
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, k) for k, a in constants.items() if k in read)
    onnx.checker.check_model(model, full_check=True)
    return model


def instance(eps: str = "0.00001", one: str = "one", zero: str = "zero", back: str = "whole") -> str:
    return INSTANCE.format(eps=eps, one=one, zero=zero, back=back)


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def run(model: onnx.ModelProto, x: npt.NDArray[Any], folder: Path) -> npt.NDArray[Any]:
    onnx.save(model, folder / "run.onnx")
    found: npt.NDArray[Any] = session(folder / "run.onnx").run(None, {"x": x})[0]
    return found


def rows(shape: tuple[int, ...], dtype: str = "float32") -> list[npt.NDArray[Any]]:
    """Random images, with a large mean, with almost no variance, and zeros."""
    x = np.random.default_rng(1).standard_normal(shape)
    return [a.astype(dtype) for a in (x, x + 100, 1e-4 * x, 0 * x)]


@pytest.mark.parametrize("opset", [18, 21, 23])
def test_of_one_group_it_becomes_a_layernorm(tmp_path: Path, opset: int) -> None:
    model = image(instance(), opset=opset)
    made, report = normfuse.optimize(model)
    assert operators(made) == ["LayerNormalization"] and report.norms[0].axes == [-3, -2, -1]
    onnx.checker.check_model(made, full_check=True)
    again, _ = normfuse.optimize(made)
    assert again.SerializeToString() == made.SerializeToString()
    for x in rows((2, C, 5, 6)):
        want = F.group_norm(torch.from_numpy(x).double(), 1, eps=1e-5).numpy()
        w, b = (onnx.numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer if t.name in "wb")
        before, after = (np.abs(run(m, x, tmp_path) - (want * w + b)).max() for m in (model, made))
        assert after <= 2 * before + 1e-6


@pytest.mark.parametrize(("body", "shape"), [
    (instance().replace("rows", "pairs").replace("one", "ones").replace("zero", "zeros"), "2,8,5,6"),
    ("y = InstanceNormalization(x, wc, bc)", "2,8,5,6"),
    ("y = GroupNormalization<num_groups = 2>(x, wc, bc)", "2,8,5,6"),
])
def test_of_several_groups_it_is_none(body: str, shape: str) -> None:
    model = image(body, shape, opset=21)
    made, report = normfuse.optimize(model)
    assert not report.norms and operators(made) == operators(model)


def test_the_weights_of_the_operator_itself_count(tmp_path: Path) -> None:
    """Two as scale and one as bias of the only channel, times and plus the weights behind."""
    model = image(instance(one="two", zero="one"))
    made, _ = normfuse.optimize(model)
    assert operators(made) == ["LayerNormalization"]
    x = rows((2, C, 5, 6))[0]
    np.testing.assert_allclose(run(made, x, tmp_path), run(model, x, tmp_path), atol=3e-6)


def test_an_operator_of_group_normalization_is_seen_and_stays() -> None:
    made, report = normfuse.optimize(image("y = GroupNormalization<num_groups = 1>(x, wc, bc)", opset=21))
    assert operators(made) == ["GroupNormalization"]
    assert [(n.kind, n.form, n.action) for n in report.norms] == [("layer_norm", "op", "kept")]


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_group_norm_in_float32_stays(dtype: torch.dtype, core: bool) -> None:
    """As fairseq's Fp32GroupNorm; it was tried in another form, and refused."""
    class Float32(nn.GroupNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.group_norm(x.float(), 1, self.weight.float(), self.bias.float(), self.eps).type_as(x)

    program = torch.export.export(Float32(1, C).to(dtype), (torch.randn(2, C, 5, 6).to(dtype),))
    program = program.run_decompositions() if core else program
    made, report = normfuse.optimize(program)
    assert [(n.kind, n.action) for n in report.norms] == [("layer_norm", "kept")] and not report.refusals
    assert [n.target for n in made.graph.nodes] == [n.target for n in program.graph.nodes]


def test_weights_of_another_length_are_not_read() -> None:
    """No runtime takes it, and it is not ours to make it valid."""
    model = image(instance())
    node = next(n for n in model.graph.node if n.op_type == "InstanceNormalization")
    node.input[1:] = ["wc", "wc"]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(C, np.float32), "wc"))
    made, report = normfuse.optimize(model)
    assert not report.norms and operators(made) == operators(model)


def test_what_a_function_would_compute_more_slowly_stays() -> None:
    """Of sizes that vary there is no operator, only a function of several; an InstanceNormalization is better."""
    model = image("k = Shape(x) " + instance(back="k"), shape="2,8,h,w_")
    made, report = normfuse.optimize(model)
    assert operators(made) == operators(model)
    assert [n.action for n in report.norms] == ["left"] and "would be slower" in report.norms[0].reason
    made, _ = normfuse.optimize(image(SPELLED, shape="2,8,h,w_"))  # of what is spelled out there is nothing better
    assert operators(made) == ["layer_norm_unseen"]


def test_a_half_keeps_its_roundings(tmp_path: Path) -> None:
    model = image(instance(), dtype="float16")
    made, _ = normfuse.optimize(model)
    assert len(made.graph.node) == 1 and made.graph.node[0].op_type.startswith("layer_norm_as_written")
    for x in rows((2, C, 5, 6), "float16"):
        np.testing.assert_array_equal(run(made, x, tmp_path), run(model, x, tmp_path))


# -- how large a weight may get ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "name", "sizes"), [
    (240, "LayerNormalization", [240]), (239, "layer_norm_unseen", [C])])  # fmt: skip
def test_a_weight_is_spread_over_a_row_only_while_it_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, name: str, sizes: list[int]) -> None:  # fmt: skip
    monkeypatch.setattr(onnx_emit, "SPREAD", most)
    model = image(SPELLED)
    made, report = normfuse.optimize(model, Config(verify="sites"))
    assert operators(made) == [name] and report.norms[0].verified
    assert {int(np.prod(t.dims)) for t in made.graph.initializer} == set(sizes)
    for x in rows((2, C, 5, 6)):
        np.testing.assert_allclose(run(made, x, tmp_path), run(model, x, tmp_path), atol=2e-5)
    kept, _ = normfuse.optimize(image(instance()))
    assert ("InstanceNormalization" in operators(kept)) is (name == "layer_norm_unseen")


@pytest.mark.parametrize(("most", "stays"), [(240, False), (239, True)])
def test_in_exchange_for_an_operator_it_has_to_be_smaller(monkeypatch: pytest.MonkeyPatch, most: int,
                                                          stays: bool) -> None:  # fmt: skip
    monkeypatch.setattr(onnx_model, "SLIM", most)
    made, report = normfuse.optimize(image(instance()))
    assert ("InstanceNormalization" in operators(made)) is stays
    assert ("many times as large" in report.norms[0].reason) is stays
    assert operators(normfuse.optimize(image(SPELLED))[0]) == ["LayerNormalization"]


@pytest.mark.parametrize(("weight", "sizes"), [
    ("k = Mul(w, w) ", [C, 1, 1]),  # computed of constants: folded, by channel
    ("o = Add(w, one) p = Mul(o, w) k = Add(p, b) ", [C, 1, 1]),
])
def test_a_weight_that_is_computed_is_not_spread_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: str, sizes: list[int]) -> None:  # fmt: skip
    monkeypatch.setattr(onnx_emit, "SPREAD", 100)
    model = image(weight + SPELLED.replace("Mul(n, w)", "Mul(n, k)"))
    made, _ = normfuse.optimize(model)
    assert operators(made)[-1] == "layer_norm_unseen"
    assert all(list(t.dims) in (sizes, [1]) for t in made.graph.initializer)
    x = rows((2, C, 5, 6))[0]
    np.testing.assert_allclose(run(made, x, tmp_path), run(model, x, tmp_path), rtol=1e-5, atol=2e-5)


def test_nor_is_a_weight_that_is_given_at_run_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(onnx_emit, "SPREAD", 100)
    model = image("k = Mul(w, u) " + SPELLED.replace("Mul(n, w)", "Mul(n, k)"), more=f", float[{C}, 1, 1] u")
    made, _ = normfuse.optimize(model)
    assert operators(made)[-1] == "layer_norm_unseen" and all(np.prod(t.dims) <= C for t in made.graph.initializer)
    x, u = rows((2, C, 5, 6))[0], np.full((C, 1, 1), 3, np.float32)
    for m, name in ((model, "a"), (made, "b")):
        onnx.save(m, tmp_path / f"{name}.onnx")
    a, b = (session(tmp_path / f"{n}.onnx").run(None, {"x": x, "u": u})[0] for n in "ab")
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_a_full_weight_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_emit, "SPREAD", 100)
    model = image(SPELLED)
    for tensor in model.graph.initializer:
        if tensor.name in "wb":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones((C, 5, 6), np.float32) * 2, tensor.name))
    made, _ = normfuse.optimize(model)
    assert operators(made) == ["LayerNormalization"]


# -- in torch ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two residual branches with group normalization."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.a, self.b = nn.GroupNorm(groups, C), nn.GroupNorm(groups, C)
        self.conv = nn.Conv2d(C, C, 1)
        for one in (self.a, self.b):
            nn.init.normal_(one.weight)
            nn.init.normal_(one.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.conv(self.a(x))
        return x + F.group_norm(x, self.b.num_groups, self.b.weight, self.b.bias)


@pytest.mark.parametrize("groups", [1, 2])
def test_in_torch_it_is_seen(groups: int) -> None:
    module, x = Block(groups).eval(), torch.randn(2, C, 5, 6)
    traced = torch.fx.symbolic_trace(module)
    ShapeProp(traced).propagate(x)
    for model in (torch.export.export(module, (x,)), traced):
        report = normfuse.inspect(model)
        seen = [("layer_norm", "op", [-3, -2, -1])] * 2
        assert [(n.kind, n.form, n.axes) for n in report.norms] == (seen if groups == 1 else [])
        assert all(n.fact == "w*(x - mean(x))*(var(x) + 1e-05)^-1/2 + b" for n in report.norms)
    made, report = normfuse.optimize(torch.export.export(module, (x,)))
    assert {n.action for n in report.norms} <= {"kept"} and not report.refusals
    torch.testing.assert_close(made.module()(x), module(x), rtol=0, atol=0)


def test_in_torch_it_is_no_layernorm_to_convert() -> None:
    module, x = Block(1).eval(), torch.randn(2, C, 5, 6)
    made, report = normfuse.optimize(module, Config(layernorm_to_rmsnorm="exact"), args=(x,))
    assert report.converted == 0 and {r.code for r in report.refusals} == {"NF301"}
    torch.testing.assert_close(made(x), module(x), rtol=0, atol=0)
