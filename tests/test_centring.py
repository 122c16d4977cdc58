"""How far a LayerNorm's mean can be pushed: one small network for each rule, and for each condition one that breaks
it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

import normfuse
from normfuse.centring import Centre, regrouped
from normfuse.config import Config
from normfuse.errors import InputError
from normfuse.report import Report

EXACT = Config(layernorm_to_rmsnorm="exact")
D = 16


class Net(nn.Module):
    """A stream made by `first`, two blocks that each read it through a LayerNorm, a last norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other = nn.Linear(8, D), nn.Linear(8, D)
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(3))
        self.blocks = nn.ModuleList(nn.Linear(D, D) for _ in range(2))
        self.head = nn.Linear(D, 5)
        self.extra = nn.Linear(D, D)
        self.scale = nn.Parameter(torch.rand(D) + 0.5)

    def stream(self, x: Tensor) -> Any:
        """What the first block reads."""
        return self.first(x)

    def branch(self, i: int, y: Tensor) -> Any:
        """What a block adds to the stream."""
        return self.blocks[i](torch.tanh(y))

    def forward(self, x: Tensor) -> Any:
        """The head's result."""
        h = self.stream(x)
        for i in range(2):
            h = h + self.branch(i, self.norms[i](h))
        return self.head(self.norms[2](h))


def settle(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.4 + 0.3)
    return module.eval()


def convert(module: nn.Module, *args: Tensor, config: Config = EXACT) -> tuple[Report, float]:
    args = args or (torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1)),)
    settle(module)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, args, strict=False)
        result, report = normfuse.optimize(program, config)
        pairs = zip(outputs(module(*args)), outputs(result.module()(*args)), strict=True)
        return report, max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def outputs(out: Any) -> list[Tensor]:
    return list(out) if isinstance(out, tuple) else [out]


def kept(report: Report) -> list[str]:
    return [n["conversion"]["reason"] for n in report.to_dict()["norms"]
            if n["kind"] == "layer_norm" and n["action"] != "converted"]  # fmt: skip


# -- what is converted ------------------------------------------------------------------------------------------------


class Plain(Net):
    pass


class LayerScale(Net):
    def branch(self, i: int, y: Tensor) -> Any:
        return self.scale * self.blocks[i](torch.tanh(y))


class Positions(Net):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 6, D))

    def stream(self, x: Tensor) -> Any:
        return self.first(x) + self.position


class ClassToken(Net):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, D))

    def stream(self, x: Tensor) -> Any:
        return torch.cat((self.token.expand(x.shape[0], -1, -1), self.first(x)), 1)


class Pooled(Net):
    def stream(self, x: Tensor) -> Any:
        return self.first(x).mean(1, keepdim=True) - self.other(x)


class ChannelsFirst(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, D, 3, padding=1)

    def stream(self, x: Tensor) -> Any:
        return F.avg_pool1d(self.conv(x.transpose(1, 2)), 2).transpose(1, 2)


class Scaled(Net):
    def stream(self, x: Tensor) -> Any:
        return self.first(x) * 3.0 + self.other(x) * x.mean(-1, keepdim=True)


class Masked(Net):
    def stream(self, x: Tensor) -> Any:
        return self.first(x).masked_fill(x[..., :1] > 0.5, 0.0)


class Softmaxed(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.stream(x)
        return self.head(self.norms[0](h)), torch.softmax(h, -1)


class VarianceRead(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.stream(x)
        return self.head(self.norms[0](h)), h.var(-1)


class UniformNorm(Net):
    """The stream is a LayerNorm's output whose weight is one number all over."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding_norm = nn.LayerNorm(D)

    def stream(self, x: Tensor) -> Any:
        return self.embedding_norm(self.first(x))


class PerHead(Net):
    """A norm of each head of the queries, which are a slice of one fused projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 3 * D)
        self.head_norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x).split(D, -1)
        q, k = (self.head_norm(t.reshape(2, 6, 4, 4).transpose(1, 2)) for t in (q, k))
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v.reshape(2, 6, 4, 4).transpose(1, 2)


class Experts(Net):
    """Rows are sent to an expert each and added back."""

    def branch(self, i: int, y: Tensor) -> Any:
        index = torch.tensor([0, 2, 4])
        rows = self.blocks[i](y.index_select(1, index)) * y[:, :3, :1]
        return torch.zeros_like(y).index_add(1, index, rows)


@pytest.mark.parametrize(("net", "converted", "operators"), [
    (Plain, 3, 0), (LayerScale, 3, 0), (Positions, 3, 0), (ClassToken, 3, 0), (Pooled, 3, 0), (ChannelsFirst, 3, 0),
    (Scaled, 3, 0), (Masked, 3, 0), (Softmaxed, 1, 0), (VarianceRead, 1, 0), (PerHead, 2, 0), (Experts, 3, 0),
])  # fmt: skip
def test_what_is_converted(net: type[Net], converted: int, operators: int) -> None:
    report, gap = convert(net())
    assert (report.converted, len(kept(report))) == (converted, 0)
    places = {o for n in report.norms for o in (n.conversion or {})["operators"]}
    assert len(places) == operators
    assert gap < 1e-5


def test_a_uniform_weight_lets_the_mean_pass_and_is_named() -> None:
    net = settle(UniformNorm())
    with torch.no_grad():
        norm: Any = net.embedding_norm
        norm.weight.fill_(1.25)
    args = (torch.randn(2, 6, 8),)
    result, report = normfuse.optimize(torch.export.export(net, args), EXACT)
    assert report.converted == 4
    assert any((n.conversion or {})["value_dependent"] for n in report.norms)
    torch.testing.assert_close(net(*args), result.module()(*args))
    report, _ = convert(UniformNorm())  # with another weight for each channel
    assert report.converted == 4
    assert len({o for n in report.norms for o in (n.conversion or {})["operators"]}) == 1


# -- what is not, each by one condition -------------------------------------------------------------------------------


class StreamIsOutput(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.stream(x)
        for i in range(2):
            h = h + self.branch(i, self.norms[i](h))
        return self.head(self.norms[2](h)), h


class RawReader(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.stream(x)
        return self.head(self.norms[0](h)) + self.head(self.extra(h))


class RMSReader(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.stream(x)
        return self.head(self.norms[0](h)) + self.head(F.rms_norm(h, (D,), self.scale, 1e-6))


class GroupReader(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.stream(x)
        return self.head(self.norms[0](h)), F.group_norm(h.transpose(1, 2), 4)


class Depthwise(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(D, D, 3, padding=1, groups=D)

    def stream(self, x: Tensor) -> Any:
        return self.conv(self.first(x).transpose(1, 2)).transpose(1, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.norms[0](self.stream(x)))


class Bent(Net):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.norms[0](F.gelu(self.first(x))))


class MaxPooled(Net):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.norms[0](self.first(x).amax(1)))


class JoinedChannels(Net):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.norms[0](torch.cat((self.first(x)[..., :8], self.other(x)[..., :8]), -1)))


class Filled(Net):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.norms[0](self.first(x).masked_fill(x[..., :1] > 0.5, 2.0)))


class SharedWeight(Net):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.norms[0](self.first(x))) + self.head(torch.tanh(self.first(x.flip(1))))


class TwoAxes(Net):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.LayerNorm((6, D))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.wide(self.first(x)))


class TwoWays(Net):
    """Normalised over the channels and over parts of them."""

    def forward(self, x: Tensor) -> Any:
        h = self.stream(x)
        return self.head(self.norms[0](h)), F.layer_norm(h.reshape(2, 6, 4, 4), (4,))


@pytest.mark.parametrize(("net", "reason"), [
    (StreamIsOutput, "output of the graph"), (RawReader, "reads it as it is"), (RMSReader, "reads it as it is"),
    (GroupReader, "reads it as it is"), (Depthwise, "groups of channels"), (Bent, "mixes or bends"),
    (MaxPooled, "mixes or bends"), (JoinedChannels, "normalised together"), (Filled, "fills all channels"),
    (SharedWeight, "reads it as it is"), (TwoAxes, "over 2 axes"), (TwoWays, "overlap"),
])  # fmt: skip
def test_what_is_refused_and_why(net: type[Net], reason: str) -> None:
    report, gap = convert(net())
    assert report.converted == 0
    assert kept(report)
    assert any(reason in why for why in kept(report)), kept(report)
    assert gap < 1e-5


class MaxNorm(nn.Module):
    def __init__(self, limit: float | None) -> None:
        super().__init__()
        self.table, self.limit, self.norm = nn.Parameter(torch.zeros(9, D)), limit, nn.LayerNorm(D)

    def forward(self, ids: Tensor) -> Any:
        return self.norm(F.embedding(ids, self.table, max_norm=self.limit))


def test_an_embedding_that_rescales_its_rows_is_refused() -> None:
    ids = torch.arange(8).reshape(2, 4)
    assert convert(MaxNorm(None), ids)[0].converted == 1
    assert convert(MaxNorm(2.0), ids)[0].converted == 0


class Noisy(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x + torch.rand_like(x) * 1e-3)


class Dropping(Net):
    def branch(self, i: int, y: Tensor) -> Any:
        return F.dropout(super().branch(i, y), 0.1, training=True)


class DroppingScores(Net):
    def branch(self, i: int, y: Tensor) -> Any:
        v = super().branch(i, y)
        return F.scaled_dot_product_attention(v, v, v, None, 0.1)


@pytest.mark.parametrize(("net", "reason"), [
    (Noisy, "random numbers"), (Dropping, "for training"), (DroppingScores, "for training"),
])  # fmt: skip
def test_a_graph_that_differs_from_itself_is_refused(net: type[Net], reason: str) -> None:
    program = torch.export.export(settle(net()), (torch.randn(2, 6, 8),), strict=False)
    report = normfuse.optimize(program, EXACT)[1]
    assert report.converted == 0
    assert {r.code for r in report.refusals} == {"NF305"}
    assert all(reason in why for why in kept(report))


def test_a_weight_with_nan_is_an_error_that_names_it() -> None:
    net = settle(Plain())
    with torch.no_grad():
        net.get_parameter("blocks.0.weight")[3, 2] = float("nan")
    program = torch.export.export(net, (torch.randn(2, 6, 8),))
    with pytest.raises(InputError, match=r"blocks_0_weight.*NaN"):
        normfuse.optimize(program, EXACT)


# -- ONNX -------------------------------------------------------------------------------------------------------------


def onnx_net(path: Path, *, quantised: bool = False, overridable: bool = False, scale: bool = False,
             random: bool = False) -> Path:  # fmt: skip
    """MatMul, bias, LayerNormalization, MatMul at opset 17."""
    rng = np.random.default_rng(0)
    constants = {"w": rng.standard_normal((8, D)) + 0.3, "b": rng.standard_normal(D) + 0.3, "g": rng.random(D) + 0.5,
                 "beta": rng.standard_normal(D), "v": rng.standard_normal((D, 5)),
                 "c": rng.standard_normal(5)}  # fmt: skip
    tensors = [numpy_helper.from_array(a.astype(np.float32), n) for n, a in constants.items()]
    nodes = [oh.make_node("MatMul", ["x", "wf" if quantised else "w"], ["h0"]), oh.make_node("Add", ["h0", "b"], ["h"]),
             oh.make_node("LayerNormalization", ["h", "g", "beta"], ["y"], name="norm", axis=-1),
             oh.make_node("MatMul", ["y", "v"], ["z0"]), oh.make_node("Add", ["z0", "c"], ["z1"]),
             oh.make_node("Relu", ["z1"], ["z"])]  # fmt: skip
    if quantised:
        tensors[0] = numpy_helper.from_array(rng.integers(-9, 9, (8, D)).astype(np.int8), "w")
        tensors += [numpy_helper.from_array(np.array(0.1, np.float32), "s"),
                    numpy_helper.from_array(np.array(0, np.int8), "zero")]
        nodes.insert(0, oh.make_node("DequantizeLinear", ["w", "s", "zero"], ["wf"], name="dq"))
    if random:
        nodes.insert(0, oh.make_node("RandomNormal", [], ["noise"], name="draw", shape=[8]))
        nodes.append(oh.make_node("Add", ["z", "noise_sum"], ["out"]))
        nodes.insert(1, oh.make_node("ReduceMean", ["noise"], ["noise_sum"], keepdims=0))
    inputs = [oh.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8])]
    if overridable:
        inputs.append(oh.make_tensor_value_info("w", TensorProto.FLOAT, [8, D]))
    out = oh.make_tensor_value_info("out" if random else "z", TensorProto.FLOAT, ["N", 5])
    graph = oh.make_graph(nodes, "g", inputs, [out], tensors)
    onnx.save(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_the_bias_goes_into_the_next_layer_and_the_weight_on_request(tmp_path: Path) -> None:
    source = onnx_net(tmp_path / "in.onnx")
    report = normfuse.rewrite(source, tmp_path / "out.onnx", Config(layernorm_to_rmsnorm="exact", verify="model"))
    assert report.converted == 1
    ops = [n.op_type for n in onnx.load(tmp_path / "out.onnx").graph.node]
    assert ops == ["MatMul", "Add", "rms_norm", "MatMul", "Add", "Relu"]
    folded = Config(layernorm_to_rmsnorm="exact", fold_scale=True, verify="model")
    normfuse.rewrite(source, tmp_path / "folded.onnx", folded)
    model = onnx.load(tmp_path / "folded.onnx")
    assert [n.op_type for n in model.graph.node] == ["MatMul", "Add", "rms_norm_plain", "MatMul", "Add", "Relu"]
    assert "g" not in {t.name for t in model.graph.initializer}


@pytest.mark.parametrize(("options", "reason"), [
    ({"quantised": True}, "quantised"), ({"random": True}, "random numbers"),
    ({"overridable": True}, "replaced by the caller"),
])  # fmt: skip
def test_an_onnx_graph_that_is_refused(options: dict[str, bool], reason: str, tmp_path: Path) -> None:
    source = onnx_net(tmp_path / "in.onnx", **options)
    report = normfuse.rewrite(source, tmp_path / "out.onnx", EXACT)
    assert report.converted == 0
    assert any(reason in r.message for r in report.refusals)
    assert (tmp_path / "out.onnx").read_bytes() == source.read_bytes()


@pytest.mark.parametrize(("source", "target", "want", "expected"), [
    (("B", 5, 24), ("B", 5, 4, 6), Centre(3, ((0, 6),)), Centre(2, ((0, 6), (6, 6), (12, 6), (18, 6)))),
    (("B", 5, 4, 6), ("B", 5, 24), Centre(2, ((0, 6), (6, 6), (12, 6), (18, 6))), Centre(3, ((0, 6),))),
    (("B", 5, 4, 6), ("B", 5, 24), Centre(2, ((0, 24),)), None),
    (("B", 5, 4, 6), ("B", 5, 24), Centre(2, ((0, 6), (6, 6))), None),
    (("B", 5, 24), ("B", 5, 4, 6), Centre(2, ((0, 4),)), None),
    (("B", "S", 24), ("n", 24), Centre(1, ((0, 24),)), Centre(2, ((0, 24),))),
    (("B", 24, "h", "w"), ("B", 24, "n"), Centre(1, ((0, 24),)), Centre(1, ((0, 24),))),
    (("B", 24, "h"), ("B", "h", 24), Centre(2, ((0, 24),)), None),
    (("B", None, 24), ("n", None, 24), Centre(2, ((0, 24),)), Centre(2, ((0, 24),))),
])  # fmt: skip
def test_an_axis_behind_a_reshape(source: Any, target: Any, want: Centre, expected: Centre | None) -> None:
    assert regrouped(source, target, want) == expected
