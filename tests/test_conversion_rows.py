"""LayerNorm to RMSNorm in programs of torch: what moves rows, what reads a norm, and what a certificate can see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import normfuse
from tests.converted import D

EXACT = normfuse.Config(layernorm_to_rmsnorm="exact")


class Ahead(nn.Module):
    """A norm of what is made of a table of tokens."""

    def __init__(self, made: Callable[[Ahead, Tensor], Tensor]) -> None:
        super().__init__()
        self.e, self.other, self.n, self.made = nn.Embedding(9, D), nn.Embedding(9, D), nn.LayerNorm(D), made
        self.w, self.square = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D, D))

    def forward(self, i: Tensor) -> Tensor:
        """The norm."""
        found: Tensor = self.n(self.made(self, i))
        return found


FIRST = torch.tensor([0, 2])[None, :, None]


@pytest.mark.parametrize(("made", "converted"), [
    (lambda m, i: F.pad(m.e(i), (0, 0, 1, 1)), 1), (lambda m, i: F.pad(m.e(i), (0, 0, 1, 1), mode="reflect"), 1),
    (lambda m, i: F.pad(m.e(i), (0, 0, 0, 0, 1, 0)), 1), (lambda m, i: F.pad(m.e(i)[..., 1:], (1, 0, 1, 1)), 0),
    (lambda m, i: m.e(i).tile(2, 1), 1), (lambda m, i: m.e(i)[..., :4].tile(2), 0),
    (lambda m, i: m.e(i).repeat_interleave(2, 1), 1), (lambda m, i: m.e(i)[..., :4].repeat_interleave(2, -1), 0),
    (lambda m, i: torch.take_along_dim(m.e(i), FIRST, 1), 1),
    (lambda m, i: torch.take_along_dim(m.e(i), FIRST.expand(2, -1, D), 1), 1),
    (lambda m, i: torch.take_along_dim(m.e(i), torch.arange(2 * D).reshape(1, 2, D) % 3, 1), 0),
    (lambda m, i: torch.take_along_dim(m.e(i), torch.arange(D)[None, None], 2), 0),
    (lambda m, i: torch.lerp(m.e(i), m.other(i), 0.3), 1),
    (lambda m, i: torch.lerp(m.e(i), m.other(i), m.w), 0),
    (lambda m, i: m.e(i).index_copy(1, torch.tensor([2, 0]), m.other(i)[:, :2]), 1),
    (lambda m, i: m.e(i).index_copy(2, torch.arange(4), m.other(i)[..., :4]), 0),
    (lambda m, i: m.e(i).scatter(1, FIRST.expand(2, -1, D), m.other(i)), 1),
    (lambda m, i: m.e(i).scatter_add(1, FIRST.expand(2, -1, D), m.other(i)), 1),
    (lambda m, i: m.e(i).scatter_add(1, FIRST.expand(2, -1, 4), m.other(i)), 0),
    (lambda m, i: m.e(i).scatter(2, FIRST.expand(2, -1, D) * 0, m.other(i)), 0),
    (lambda m, i: torch.cat([h := m.e(i), h], 1), 1), (lambda m, i: torch.stack([h := m.e(i), h], 1), 1),
    (lambda m, i: torch.baddbmm(h := m.e(i), h, m.square.expand(2, D, D)), 0),
    (lambda m, i: torch.addmm(h := m.e(i[0]), h, m.square), 0),
    (lambda m, i: torch.einsum("btd,bse->bsd", h := m.e(i), h), 0),
    (lambda m, i: F.scaled_dot_product_attention(h := m.e(i), h, h), 0),
    (lambda m, i: torch.addcmul(m.e(i), m.other(i), m.w), 0),  # of one operator nothing is taken out
    (lambda m, i: m.e(i) + m.other(i) * m.w, 1),
])  # fmt: skip
@pytest.mark.parametrize("verify", ["off", "sites"])
def test_rows_that_are_moved_and_channels_that_are(made: Callable[[Ahead, Tensor], Tensor], converted: int,
                                                   verify: Any) -> None:  # fmt: skip
    torch.manual_seed(0)
    module, i = Ahead(made).eval(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    config = normfuse.Config(layernorm_to_rmsnorm="exact", verify=verify)
    result, report = normfuse.optimize(torch.export.export(module, (i,)), config)
    assert [(n.conversion or {})["verdict"] for n in report.norms] == ["exact" if converted else "kept"]
    assert all(r.code == "NF303" for r in report.refusals)
    torch.testing.assert_close(result.module()(i), module(i), rtol=1e-4, atol=1e-5)


def test_a_factor_that_is_added_too() -> None:
    """Its copy is edited, and the other is taken out."""
    module, i = Ahead(lambda m, i: m.e(i) + m.other(i) * m.w + m.w).eval(), torch.tensor([[1, 2, 3]])
    for untie in (False, True):
        config = normfuse.Config(layernorm_to_rmsnorm="exact", untie=untie)
        result, report = normfuse.optimize(torch.export.export(module, (i,)), config)
        assert [(n.conversion or {})["verdict"] for n in report.norms] == ["exact" if untie else "kept"]
        torch.testing.assert_close(result.module()(i), module(i), rtol=1e-4, atol=1e-5)


class Read(nn.Module):
    """A norm of embeddings, and what reads it."""

    def __init__(self, read: Callable[[Read, Tensor], Tensor], rows: int = 6) -> None:
        super().__init__()
        self.e, self.n, self.read = nn.Embedding(9, D), nn.LayerNorm(D), read
        self.c, self.v, self.w = nn.Conv1d(rows, 5, 3), nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(5, D))
        self.b, self.other, self.each = (nn.Parameter(torch.randn(n)) for n in ((5,), (5,), (rows, 5)))
        nn.init.normal_(self.n.weight)
        nn.init.normal_(self.n.bias)

    def forward(self, i: Tensor) -> Tensor:
        """What was read."""
        return self.read(self, self.n(self.e(i)))


@pytest.mark.parametrize("fold_scale", [False, True])
@pytest.mark.parametrize("read", [
    lambda m, y: F.linear(y, m.w, m.b + m.other), lambda m, y: F.linear(y, m.w, m.b.view(5)),
    lambda m, y: F.linear(y, m.w, m.b * 2), lambda m, y: F.linear(y, m.w, m.b.repeat(1)),
    lambda m, y: torch.addmm(m.each, y, m.w.t()), lambda m, y: torch.addmm(m.each[:1], y, m.w.t()),
    lambda m, y: F.linear(y, m.w, m.each), lambda m, y: F.linear(y, m.v), lambda m, y: y @ m.v, lambda m, y: m.c(y),
    lambda m, y: (lambda t: y @ t + t.sum(0))(m.w.t()),
    lambda m, y: (lambda t: y @ t + (m.v @ t).exp())(m.w.t())])  # fmt: skip
@pytest.mark.parametrize("rows", [6, D])
@pytest.mark.parametrize("biased", [True, False])
def test_layers_into_which_a_bias_or_weight_does_not_go(read: Any, fold_scale: bool, rows: int, biased: bool) -> None:
    """Biases that are computed or differ by row, weights of one axis, channels that are the rows, shared views."""
    torch.manual_seed(0)
    module, i = Read(read, rows).eval(), torch.arange(rows) % 9
    if not biased:
        module.n.register_parameter("bias", None)
    config = normfuse.Config(layernorm_to_rmsnorm="exact", fold_scale=fold_scale)
    result, report = normfuse.optimize(torch.export.export(module, (i,)), config)
    assert [(n.conversion or {})["verdict"] for n in report.norms] == ["exact"]
    torch.testing.assert_close(result.module()(i), module(i), rtol=1e-4, atol=1e-4)


class Fresh(nn.Module):
    """Norms as they are before training, of which one reads another: a bias of zeros is all that is edited."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.a, self.b, self.c = nn.Linear(D, D), nn.LayerNorm(D), nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of two norms."""
        h = self.l(x).relu()
        found: Tensor = self.b(self.a(h)) + self.c(h)
        return found


def test_the_only_edit_is_of_a_bias_of_zeros() -> None:
    torch.manual_seed(0)
    module, x = Fresh().eval(), torch.randn(3, D)
    nn.init.normal_(module.b.weight)
    result, report = normfuse.optimize(torch.export.export(module, (x,)), EXACT)
    assert report.converted == 3, report.refusals
    torch.testing.assert_close(result.module()(x), module(x), rtol=1e-4, atol=1e-5)


class Blank(nn.Module):
    """Two norms of an input, of which the output shows nothing."""

    def __init__(self, hide: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.n, self.m, self.hide = nn.LayerNorm(D), nn.LayerNorm(D), hide

    def forward(self, x: Tensor) -> Tensor:
        """NaN or infinities alone."""
        return self.hide(-1 - self.n(x).square() - self.m(x).square())


@pytest.mark.parametrize("hide", [torch.sqrt, lambda v: v / 0])
def test_outputs_that_show_nothing_certify_nothing(hide: Callable[[Tensor], Tensor]) -> None:
    program = torch.export.export(Blank(hide).eval(), (torch.randn(2, D),))
    report = normfuse.optimize(program, EXACT)[1]
    assert report.converted == 0 and {r.code for r in report.refusals} == {"NF304"}


class Placed(nn.Module):
    """Positions that are counted on a device, in a branch too."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.p, self.n, self.o = nn.Embedding(9, D), nn.Embedding(9, D), nn.LayerNorm(D), nn.Linear(D, 3)

    def forward(self, i: Tensor) -> Tensor:
        """The last layer."""
        at = torch.arange(i.shape[1], device=i.device)
        h = self.n(self.e(i) + self.p(at))
        more: Tensor = torch.cond(i.sum() > 3, self._ones, torch.neg, (h,))
        found: Tensor = self.o(h + more)
        return found

    @staticmethod
    def _ones(h: Tensor) -> Tensor:
        return h * torch.ones(D, device=h.device)


def test_a_program_for_a_gpu_is_certified_on_the_cpu() -> None:
    """Wherever its nodes say that they are computed."""
    torch.manual_seed(0)
    with torch.no_grad():
        program = torch.export.export(Placed().eval(), (torch.tensor([[1, 2, 3]]),))
    placed = 0
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            if any(isinstance(v, torch.device) for v in node.kwargs.values()):
                node.kwargs = {k: torch.device("cuda") if k == "device" else v for k, v in node.kwargs.items()}
                placed += 1
    assert placed == 2
    _, report = normfuse.optimize(program, EXACT)
    assert [(n.conversion or {})["verdict"] for n in report.norms] == ["exact"] and not report.refusals


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["exact", "approximate"])
def test_on_a_gpu(mode: Any) -> None:
    """A module and a program whose tensors are there: so are those of the result."""
    torch.manual_seed(0)
    norms = nn.LayerNorm(D), nn.LayerNorm(D)
    module = nn.Sequential(nn.Embedding(9, D), norms[0], nn.GELU(), norms[1], nn.Linear(D, 3)).eval().cuda()
    given = [(torch.randint(0, 9, (2, 5), device="cuda"),) for _ in range(8)]
    measured = given if mode == "approximate" else None
    config = normfuse.Config(layernorm_to_rmsnorm="approximate", tolerance=9.0) if measured else EXACT
    made, report = normfuse.optimize(module, config, args=given[0], calibration=measured)
    program, other = normfuse.optimize(torch.export.export(module, given[0]), config, calibration=measured)
    assert report.converted == other.converted == (2 if measured else 1)
    for result in (made, program.module()):
        found = result(*given[1])
        assert found.is_cuda and (measured or torch.allclose(found, module(*given[1]), atol=1e-4))
