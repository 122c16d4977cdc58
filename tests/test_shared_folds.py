"""Biases and weights of norms in linear layers that read several of them: a layer that is called again."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.sessions import session
from tests.converted import D, drawn
from tests.layernorm_models import to_onnx


class Again(nn.Module):
    """A block that is called twice; `second` says what is different in its second call."""

    def __init__(self, second: str) -> None:
        super().__init__()
        self.embed, self.head, self.second = nn.Linear(4, D), nn.Linear(D, 3), second
        self.norm, self.other, self.last = nn.LayerNorm(D), nn.LayerNorm(D), nn.LayerNorm(D)
        self.raw = nn.Parameter(torch.ones(D))
        self.up, self.beside, self.down = nn.Linear(D, 12), nn.Linear(D, 12), nn.Linear(12, D)

    def block(self, x: Tensor, h: Tensor, second: str) -> Tensor:
        y = self.other(h) if second == "another norm" else self.norm(h)
        up = self.up(torch.tanh(y) if second == "something between" else y)
        if second == "a layer more":
            up = up + self.beside(y)
        if second == "the weight alone":
            up = nn.functional.linear(y, self.up.weight, self.beside.bias)
        if second == "read raw":
            up = up + self.up(torch.tanh(x.sum(dim=(1, 2), keepdim=True) * self.raw))
        out: Tensor = h + self.down(torch.tanh(up))
        return out

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(x, self.block(x, self.embed(x), ""), self.second)
        out: Tensor = self.head(self.last(h))
        return out


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("verify", ["off", "sites"])
@pytest.mark.parametrize("opset", [0, 18])
@pytest.mark.parametrize(("second", "shared"), [
    ("", 2), ("a layer more", 2), ("another norm", 0), ("something between", 0), ("the weight alone", 0),
    ("read raw", 0)])
def test_a_layer_that_is_called_again(second: str, shared: int, opset: int, verify: Any, scale: bool) -> None:
    """The bias goes in once, if all that the layer reads has it; the last norm's goes into the head in any case."""
    module, x = drawn(Again(second)), torch.randn(2, 3, 4) + 1
    config = normfuse.Config(layernorm_to_rmsnorm="exact", verify=verify, fold_scale=scale)
    want: Any = module(x).detach()
    if opset:
        program = to_onnx(module, (x,), opset).model_proto
        result, report = normfuse.optimize(program, config)
        given = {program.graph.input[0].name: x.numpy()}
        got = torch.from_numpy(session(result.SerializeToString()).run(None, given)[0])
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result, report = normfuse.optimize(torch.export.export(module, (x,)), config)
        got = result.module()(x)
    assert [(n.conversion or {})["verdict"] for n in report.norms] == ["exact"] * 3, report.refusals
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for kind in ("biases", "weights")[: 1 + scale]:
        assert f"the {kind} of {shared + 1} norms went into the linear layers behind them" in report.notes


def test_norms_that_differ_in_their_weight_share_no_scale() -> None:
    """And in their bias, nothing."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up = nn.Linear(4, D), nn.Linear(D, 5)
            self.a, self.b = nn.LayerNorm(D), nn.LayerNorm(D)
            self.b.bias = self.a.bias

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.embed(x)
            return self.up(self.a(h)), self.up(self.b(h))

    module, x = drawn(Two()), torch.randn(2, 3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, (x,))
    verify: Any
    for verify in ("off", "sites"):
        config = normfuse.Config(layernorm_to_rmsnorm="exact", verify=verify, fold_scale=True)
        result, report = normfuse.optimize(program, config)
        assert report.converted == 2 and not any("went into" in note for note in report.notes)
        for got, want in zip(result.module()(x), module(x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("verify", ["off", "sites"])
@pytest.mark.parametrize("scale", [False, True])
def test_a_layer_that_is_copied_takes_nothing_in(scale: bool, verify: Any) -> None:
    """On request its weight is copied for one of its readers, and centred there: the other would lose the bias."""

    class Untied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.head = nn.Linear(4, D), nn.Linear(D, D), nn.Linear(D, 3)
            self.norm, self.last = nn.LayerNorm(D), nn.LayerNorm(D)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.embed(x)
            a, b = self.up(self.norm(h)), self.up(self.norm(-h))
            return self.head(self.last(a)), torch.tanh(b)

    module, x = drawn(Untied()), torch.randn(2, 3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, (x,))
    asked = normfuse.Config(layernorm_to_rmsnorm="exact", verify=verify, fold_scale=scale, untie=True)
    result, report = normfuse.optimize(program, asked)
    assert report.converted == 3
    for got, want in zip(result.module()(x), module(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
