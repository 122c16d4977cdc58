"""Exported programs and captured graphs in forms that are easily overlooked: call signatures, axes that are moved,
lengths that are data, types that nobody names."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import normfuse
from tests.compiling import EPS, compiled, last, rms


class Block(nn.Module):
    """A norm of a sum, both of which leave the module."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.l = nn.RMSNorm(8, eps=EPS), nn.Linear(8, 8)

    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        h = x + r
        return self.l(self.n(h)), h


class Blocks(nn.Module):
    """Two of them, and a norm of a sum that is taken outside of its module."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.f = nn.ModuleList([Block(), Block()]), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        r = x.sin()
        for b in self.b:
            x, r = b(x, r)
        found: Tensor = self.f(x + r)
        return found


def test_call_signatures_that_were_to_be_preserved() -> None:
    torch.manual_seed(0)
    module, x = Blocks(), torch.randn(4, 8)
    program = torch.export.export(module, (x,), preserve_module_call_signature=("b.0", "b.1", "f"))
    result, report = normfuse.optimize(program)
    assert [n.action for n in report.norms] == ["fused"] * 3
    assert any(note.startswith("not preserved: the call signatures of ") and "f" in note for note in report.notes)
    torch.testing.assert_close(result.module()(x), module(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's own, of the original program as well
        torch.testing.assert_close(torch.export.unflatten(result)(x), module(x))
    assert not normfuse.optimize(torch.export.export(module, (x,)))[1].notes


class Chain(nn.Module):
    """The sum of one block is normalised in the next."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f = nn.RMSNorm(8, eps=1e-6), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.f(self.norm(x))
        return out


@pytest.mark.parametrize("kept", [(), ("0", "1")])
@pytest.mark.parametrize("decomposed", [False, True])
def test_a_sum_of_one_module_that_the_next_normalises(kept: tuple[str, ...], decomposed: bool) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(Chain(), Chain(), nn.RMSNorm(8)).eval().requires_grad_(False), torch.randn(4, 8)
    program = torch.export.export(module, (x,), preserve_module_call_signature=kept)
    result, report = normfuse.optimize(program.run_decompositions() if decomposed else program)
    assert sum("normfuse.add_rms_norm" in n.emitted for n in report.norms) == 2
    assert [note.split(",")[0] for note in report.notes] == ["not preserved: the call signatures of 0"] * bool(kept)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of the original program as well
        torch.testing.assert_close(torch.export.unflatten(result)(x), module(x))


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("f", [
    lambda s, x, w: F.rms_norm(s, (8,), w), lambda s, x, w: F.layer_norm(s, (8,), w),
])  # fmt: skip
def test_a_gradient_at_a_sum_that_a_graph_gives(f: Any, view: bool) -> None:
    def g(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        s = x + r
        return f(s, x, w), s.view(4, 8) if view else s

    given = [torch.randn(4, 8, requires_grad=True) for _ in range(2)] + [torch.rand(8)]

    def gradient(h: Any) -> Tensor:
        y, s = h(*given)
        return torch.autograd.grad(y.sin().sum() + s.pow(2).sum(), s if not view else given[0])[0]

    torch.testing.assert_close(gradient(compiled(g, "eager")), gradient(g))
    assert not any("add_" in n.emitted for n in last().norms)
    with torch.no_grad():  # as inference has it
        torch.testing.assert_close(compiled(g, "eager")(*given), g(*given))
    assert [n.emitted for n in last().norms if "add_" in n.emitted]


def test_a_prefix_whose_length_is_data() -> None:
    class Prefix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(16, eps=1e-6)

        def forward(self, x: Tensor, n: Tensor) -> Tensor:
            k = n.item()
            torch._check(k >= 1)  # type: ignore[no-untyped-call]
            torch._check(k <= x.shape[1])  # type: ignore[no-untyped-call]
            t = x[:, :k]
            out: Tensor = self.norm(t + t.sin())
            return out

    module, given = Prefix().eval().requires_grad_(False), (torch.randn(2, 6, 16), torch.tensor(3))
    result, report = normfuse.optimize(torch.export.export(module, given))
    assert [n.emitted for n in report.norms] == ["normfuse.add_rms_norm"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.testing.assert_close(result.run_decompositions().module()(*given), module(*given))


@pytest.mark.parametrize("ones", [
    lambda: torch.ones(8, 1) / 8, lambda: torch.full((8, 1), 1 / 8), lambda: (torch.ones(8) / 8).unsqueeze(1)])
def test_a_mean_that_is_a_product_with_what_names_no_type(ones: Callable[[], Tensor]) -> None:
    def f(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        s = x + r
        return s * torch.rsqrt((s * s) @ ones() + 1e-6), s

    x, r = torch.randn(4, 8), torch.randn(4, 8)
    torch.testing.assert_close(compiled(f)(x, r), f(x, r))
    assert [n.emitted for n in last().norms] == ["normfuse.add_rms_norm"]


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("start", [
    torch.zeros_like, lambda x: x.new_zeros(x.shape), lambda x: torch.full_like(x, 0.0),
    lambda x: torch.ones_like(x) - torch.ones_like(x)])  # fmt: skip
def test_a_stream_that_begins_with_zeros(start: Callable[[Tensor], Tensor], layer: bool) -> None:
    """DETR's decoder."""
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.w = nn.Linear(8, 8), nn.Parameter(torch.rand(8))

        def forward(self, x: Tensor) -> Tensor:
            h = start(x) + self.f(x)
            r = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + start(x[..., :1]) + 1e-6)
            out: Tensor = F.layer_norm(h, (8,), self.w) if layer else h * r * self.w
            return out

    torch.manual_seed(0)
    module, x = Stream().eval().requires_grad_(False), torch.randn(2, 7, 8)
    result, report = normfuse.optimize(torch.export.export(module, (x,)))
    assert [n.action for n in report.norms] == ["fused"] and not report.refusals
    torch.testing.assert_close(result.module()(x), module(x))
    torch.testing.assert_close(compiled(module)(x), module(x))


@pytest.mark.parametrize(("groups", "found"), [(1, 1), (2, 0)])
def test_a_group_norm_that_torch_has_decomposed(groups: int, found: int) -> None:
    torch.manual_seed(0)
    norm, x = nn.GroupNorm(groups, 8), torch.randn(2, 4, 6)
    nn.init.normal_(norm.weight)
    module = nn.Sequential(nn.Conv1d(4, 8, 1), norm).eval().requires_grad_(False)
    program = torch.export.export(module, (x,)).run_decompositions()
    result, report = normfuse.optimize(program)
    assert len(report.norms) == found
    torch.testing.assert_close(result.module()(x), module(x))


@pytest.mark.parametrize("f", [
    lambda x, r: torch.add(r, F.layer_norm(x, (8,)), alpha=2), lambda x, r: torch.sub(r, F.rms_norm(x, (8,)), alpha=2),
])  # fmt: skip
def test_a_norm_that_alpha_scales(f: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, r = torch.randn(4, 8), torch.randn(4, 8)
    torch.testing.assert_close(compiled(f)(x, r), f(x, r))


class Average(nn.Module):
    """A moving average is the only reader of the norm, in a block that gives no result."""

    ema: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.n = nn.LayerNorm(8)
        self.register_buffer("ema", torch.zeros(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(x)
        with torch.no_grad():
            self.ema.mul_(0.9).add_(y, alpha=0.1)
        return x * 2


def test_a_norm_whose_reader_has_no_result() -> None:
    x = torch.randn(4, 8)
    program = torch.export.export(Average(), (x,))
    result, report = normfuse.optimize(program)
    found, want = result.module(), Average()
    torch.testing.assert_close(found(x), want(x))
    torch.testing.assert_close(found.ema, want.ema)
    assert len(report.norms) == 1


@pytest.mark.parametrize("like", [
    lambda h, x: h.type_as(x), lambda h, x: h.to(x), lambda h, x: h.view_as(x), lambda h, x: h.expand_as(x),
])  # fmt: skip
@pytest.mark.parametrize("exported", [True, False])
def test_an_operand_that_gives_a_type_or_shape(like: Callable[[Tensor, Tensor], Tensor], exported: bool) -> None:
    """It is an input of the graph, and no part of the norm."""
    class Like(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l, self.w = nn.Linear(8, 8), nn.Parameter(torch.rand(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.w * rms(like(self.l(x).relu(), x))

    module, x = Like(), torch.randn(3, 8)
    if exported:
        report = normfuse.optimize(torch.export.export(module, (x,)))[1]
    else:
        torch.testing.assert_close(compiled(module)(x), module(x))
        report = normfuse.last_report() or report
    assert [n.action for n in report.norms] == ["fused"]


@pytest.mark.parametrize("move", [
    lambda x: x.movedim(1, -1), lambda x: torch.moveaxis(x, (1,), (-1,)), lambda x: x.movedim((2, 1), (1, 2)),
    lambda x: x.mH, lambda x: x.adjoint(), torch.ops.aten.mT, torch.ops.aten.mH,  # as Dynamo writes it from 2.15 on
])  # fmt: skip
def test_axes_that_are_moved(move: Callable[[Tensor], Tensor]) -> None:
    def f(x: Tensor, r: Tensor) -> Tensor:
        return x * torch.rsqrt(move(x).pow(2).mean(-1) + EPS).unsqueeze(1) + r

    x, r = torch.randn(2, 8, 5), torch.randn(2, 8, 5)
    torch.testing.assert_close(compiled(f)(x, r), f(x, r))
    report = normfuse.last_report()
    assert report is not None and [n.axes for n in report.norms] == [[-2]]


@pytest.mark.parametrize("move", [lambda x: x.T, lambda x: x.H, torch.ops.aten.numpy_T, torch.ops.aten.matrix_H])
def test_axes_of_a_matrix_that_are_turned(move: Callable[[Tensor], Tensor]) -> None:
    def f(x: Tensor, r: Tensor) -> Tensor:
        return x * torch.rsqrt(move(x).pow(2).mean(-1) + EPS) + r

    x, r = torch.randn(8, 5), torch.randn(8, 5)
    torch.testing.assert_close(compiled(f)(x, r), f(x, r))
    report = normfuse.last_report()
    assert report is not None and [n.axes for n in report.norms] == [[-2]]
