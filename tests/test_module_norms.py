"""LayerNorm to RMSNorm in an `nn.Module`: which modules are norms and no more, and the one that takes their place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import normfuse
from tests.converted import D, drawn


@pytest.mark.parametrize("register", [
    lambda m, hook: m.register_forward_hook(hook), lambda m, hook: m.register_forward_pre_hook(hook),
    lambda m, hook: setattr(m, "forward", hook)])  # fmt: skip
def test_a_norm_module_with_hooks_stays(register: Callable[[nn.Module, Any], Any]) -> None:
    module = drawn(nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D), nn.LayerNorm(D)))
    register(module.get_submodule("1"), lambda *given: None if isinstance(given[0], nn.Module) else given[0] * 2)
    x = torch.randn(2, D)
    result, report = normfuse.optimize(module, normfuse.Config(layernorm_to_rmsnorm="exact"), args=(x,))
    assert [n.action for n in report.norms][-1] == "converted" and type(result.get_submodule("1")) is nn.LayerNorm
    torch.testing.assert_close(result(x), module(x))


class Counting(nn.LayerNorm):
    """It counts its calls."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__(D)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().forward(x)


class Ended(nn.LayerNorm):
    """It has a part."""

    def __init__(self, seen: list[int]) -> None:
        super().__init__(D)
        self.end = nn.Identity()
        self.end.register_forward_hook(lambda *_: seen.append(1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.end(super().forward(x))
        return y


def test_a_norm_module_with_a_state_or_a_part_with_hooks_stays() -> None:
    seen: list[int] = []
    module = nn.Sequential(nn.Linear(D, D), Counting(), nn.Linear(D, D), Ended(seen), nn.Linear(D, D), nn.LayerNorm(D))
    x = torch.randn(2, D)
    result, report = normfuse.optimize(module.eval(), normfuse.Config(layernorm_to_rmsnorm="exact"), args=(x,))
    assert report.converted == 1 and [type(m) for m in result][1::2] == [Counting, Ended, normfuse.nn.RMSNorm]
    calls, runs = result.state_dict()["1.calls"].clone(), len(seen)
    torch.testing.assert_close(result(x), module(x))
    assert result.state_dict()["1.calls"] == calls + 1 and len(seen) == runs + 2


def test_a_converted_module_does_what_others_do() -> None:
    """It is traced by torch.fx, and takes nested tensors."""
    module, x = drawn(nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, 3))), torch.randn(2, D)
    result, _ = normfuse.optimize(module, normfuse.Config(layernorm_to_rmsnorm="exact"), args=(x,))
    torch.testing.assert_close(torch.fx.symbolic_trace(result)(x), module(x))
    rows: Any = torch.nested.nested_tensor([torch.randn(3, D), torch.randn(2, D)], layout=torch.jagged)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(result(rows).values(), module(rows).values())


class Masked(nn.Module):
    """DeBERTa's embeddings: times a mask, which is one of ones where none is given."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.n, self.f = nn.Embedding(9, D), nn.LayerNorm(D), nn.Linear(D, 5)

    def forward(self, i: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = torch.ones(i.shape) if mask is None else mask
        found: Tensor = self.f(self.n(self.e(i)) * mask.unsqueeze(2))
        return found


@pytest.mark.parametrize("mask", [False, True])
def test_a_norm_times_a_mask_of_ones_is_its_module(mask: bool) -> None:
    """And the module that comes of it takes another mask."""
    module, i = drawn(Masked()), torch.randint(0, 9, (2, 3))
    args = (i, torch.ones(2, 3)) if mask else (i,)
    made, report = normfuse.optimize(module, normfuse.Config(layernorm_to_rmsnorm="exact"), args=args)
    assert report.converted == 1 and isinstance(made.n, normfuse.nn.RMSNorm)
    for more in ((), (torch.ones(2, 3),), (torch.rand(2, 3),)):
        torch.testing.assert_close(made(i, *more), module(i, *more))


class Shared(nn.Module):
    """One norm for two layers; `last`: what it reads the second time."""

    def __init__(self, last: Callable[[Any, Tensor], Tensor], norm: nn.Module) -> None:
        super().__init__()
        self.f, self.g, self.h = (nn.Linear(D, D) for _ in range(3))
        self.n, self.last = norm, last

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(self.f(x))
        return self.last(self, y)


class Loose(nn.LayerNorm):
    """With an eps that is added to its own."""

    def forward(self, x: Tensor, more: float = 0.0) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps + more)


@pytest.mark.parametrize(("last", "converted"), [
    (lambda m, y: m.h(m.n(m.g(y.relu()))), 2), (lambda m, y: m.h(m.n(y.relu())), 0), (lambda m, y: m.n(m.n(y)), 0),
    (lambda m, y: m.h(m.n(m.g(y), 0.1)), 0), (lambda m, y: m.h(m.n(m.g(y), 0.0)), 0)])  # fmt: skip
def test_a_norm_module_that_is_called_twice(last: Callable[[Any, Tensor], Tensor], converted: int) -> None:
    """It is replaced where each call of it is converted, and in the same way."""
    module, x = drawn(Shared(last, Loose(D))), torch.randn(2, D)
    made, report = normfuse.optimize(module, normfuse.Config(layernorm_to_rmsnorm="exact"), args=(x,))
    assert report.converted == converted and isinstance(made.n, normfuse.nn.RMSNorm) is bool(converted)
    torch.testing.assert_close(made(x), module(x))
    assert set(report.operators_after) & {"layer_norm", "rms_norm"} == {"rms_norm" if converted else "layer_norm"}


class Plus(nn.LayerNorm):
    """1 + weight, added before or after a cast."""

    early = True

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + 1.0 if self.early else self.weight.float() + 1.0
        bias = self.bias if self.early else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight.float(), bias.float(), self.eps).to(x)


@pytest.mark.parametrize(("dtype", "early", "converted"), [
    (torch.float32, True, 1), (torch.bfloat16, True, 1), (torch.bfloat16, False, 0)])  # fmt: skip
def test_a_norm_module_that_adds_to_its_weight(dtype: torch.dtype, early: bool, converted: int) -> None:
    """The addition is in the type of the weight, or else the module stays."""
    module = drawn(nn.Sequential(nn.Linear(D, D), Plus(D), nn.Linear(D, D))).to(dtype)
    module.get_submodule("1").early = early  # type: ignore[assignment]
    x = torch.randn(2, D, dtype=dtype)
    made, report = normfuse.optimize(module, normfuse.Config(layernorm_to_rmsnorm="exact"), args=(x,))
    assert report.converted == converted
    near = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(made(x), module(x), rtol=near, atol=near)
    if converted:
        new = made.get_submodule("1")
        assert isinstance(new, normfuse.nn.RMSNorm) and new.offset == 1.0 and "offset=1.0" in repr(new)
        made.load_state_dict(module.state_dict())


def test_weights_of_a_type_of_their_own() -> None:
    """As quantized ones are: there is no storage to compare, and nothing to draw at random."""
    class Wrapped(Tensor):
        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
            assert func is torch.ops.aten.detach.default, f"nothing computes {func}"
            return args[0]

    weight = Tensor._make_wrapper_subclass(Wrapped, (4, D), dtype=torch.float32)
    module = drawn(nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, 4)))
    program = torch.export.export(module, (torch.randn(2, D),))
    program.state_dict["2.weight"] = nn.Parameter(weight, requires_grad=False)
    _, report = normfuse.optimize(program, normfuse.Config(layernorm_to_rmsnorm="exact"))
    assert report.converted == 0 and "is a Wrapped" in report.refusals[0].message


def test_the_type_under_autocast() -> None:
    """The weights are wider than x there, and the bias would make the result so."""
    module, x = drawn(nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D))), torch.randn(2, D)
    made, report = normfuse.optimize(module, normfuse.Config(layernorm_to_rmsnorm="exact"), args=(x,))
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it takes a slower form
        got, want = made(x), module(x)
    assert report.converted == 1 and got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0.03, atol=0.03)


class ByHeads(nn.Module):
    """A norm of each head and a weight for each, as Cohere's of query and key."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, turned = form, form == "turned"
        self.weight = nn.Parameter(torch.randn((D, 2) if turned else (1, D) if form == "one" else (2, D)))
        self.bias = nn.Parameter(torch.randn(2, D)) if form in ("biased", "widened") else None

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "wide":
            wide = x.float()
            centred = wide - wide.mean(-1, keepdim=True)
            scaled = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
            return (self.weight.float() * scaled).to(x.dtype)
        h = F.layer_norm(x, (D,))
        if self.form == "whole":
            return h.to(torch.int32) * self.weight
        if self.form == "narrow":
            return h.half() * self.weight
        if self.form == "read twice":
            return h * self.weight + h.relu()
        if self.form == "widened":  # more than x has
            return (h * self.weight)[..., None, :, :] + self.bias[:, None]  # type: ignore[index]
        h = h * (self.weight.t() if self.form == "turned" else self.weight)
        return h if self.bias is None else h + self.bias


class Heads(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.l, self.inside, self.o = nn.Linear(D, 2 * D), ByHeads(form) if form else None, nn.LazyLinear(D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.l(x).view(*x.shape[:-1], 2, D)
        h = F.layer_norm(h, (D,)) if self.inside is None else self.inside(h)
        out: Tensor = self.o(h.flatten(1))
        return out


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize(("form", "converted", "said"), [
    ("plain", 1, ""), ("biased", 1, ""), ("wide", 1, ""), ("one", 1, ""),
    ("read twice", 0, "inside, a ByHeads"), ("widened", 0, "inside, a ByHeads"), ("turned", 0, "inside, a ByHeads"),
    ("whole", 0, "inside, a ByHeads"), ("narrow", 0, "inside, a ByHeads"),
    ("", 0, "the model, a Heads")])  # fmt: skip
def test_a_norm_with_a_weight_for_each_head(form: str, converted: int, said: str) -> None:
    """Which its module computes; a norm that is only a part of a module is told where it stands."""
    x, module = torch.randn(3, D) + 2, Heads(form)
    module(x)
    result, report = normfuse.optimize(drawn(module), normfuse.Config(layernorm_to_rmsnorm="exact"), args=(x,))
    assert report.converted == converted
    assert [(r.code, r.message.partition("function of ")[2]) for r in report.refusals] == [("NF301", said)] * bool(said)
    assert isinstance(result.inside, normfuse.nn.RMSNorm) == bool(converted)
    torch.testing.assert_close(result(x), module(x))
    with torch.no_grad():
        torch.testing.assert_close(result.double()(x.double()).float(), module(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_heads_in_half_types(dtype: torch.dtype) -> None:
    """They are taken in float32, and rounded once, as the norm that was replaced did."""
    norm = ByHeads("wide").to(dtype)
    x = torch.randn(64, 2, D, dtype=torch.float64)
    x = (x - x.mean(-1, keepdim=True)).to(dtype)
    new = normfuse.nn.RMSNorm.of(norm, D, 1e-5)
    exact = normfuse.nn.RMSNorm(D, 1e-5, nn.Parameter(norm.weight.double()))(x.double())
    assert new(x).dtype == dtype and repr(new) == "RMSNorm(2x8, eps=1e-05, bias=False)"
    assert (new(x) - exact).abs().max() <= 1.01 * (exact.to(dtype) - exact).abs().max()


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("affine", [True, False])
def test_second_derivatives_at_a_row_of_zeros(affine: bool) -> None:
    """As those of LayerNorm, they are finite there: padding is such a row, and a penalty on gradients takes them."""
    weight, bias = (nn.Parameter(torch.randn(D)) if affine else None for _ in range(2))
    norm = normfuse.nn.RMSNorm(D, 1e-5, weight, bias)
    x = torch.randn(3, D).index_fill(0, torch.tensor(1), 0.0).requires_grad_()
    (gradient,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    assert gradient.isfinite().all() and second.isfinite().all() and second.count_nonzero()
    with torch.no_grad():
        torch.testing.assert_close(norm(x), norm(x.double()).float())
    traced: Any = torch.jit.trace(norm, x.detach())  # type: ignore[no-untyped-call]  # which checks itself without gradients
    torch.testing.assert_close(traced(x), norm(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("weight", "bias"), [(True, True), (True, False), (False, False)])
def test_it_can_be_scripted(axis: int, dtype: torch.dtype, weight: bool, bias: bool) -> None:
    w, b = (nn.Parameter(torch.randn(D, dtype=dtype)) if on else None for on in (weight, bias))
    norm = normfuse.nn.RMSNorm(D, 1e-5, w, b, axis=axis, offset=1.0)
    scripted: Any = torch.jit.script(norm)
    x = torch.randn(2, D, D, dtype=dtype)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(scripted(x), norm(x))


class Encoder(nn.Module):
    """torch's own layers, which it computes by one operator in evaluation without gradients."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, 2, 2 * D, batch_first=True, norm_first=first)
        self.l, self.o = nn.Linear(D, D), nn.Linear(D, 3)
        self.e = nn.TransformerEncoder(layer, 2, nn.LayerNorm(D), enable_nested_tensor=not first)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        out: Tensor = self.o(self.e(self.l(x), src_key_padding_mask=padding))
        return out


PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


def test_layers_that_torch_computes_by_an_operator_of_its_own_are_told_of() -> None:
    module, x = drawn(Encoder(True)), torch.randn(2, 5, D)
    result, report = normfuse.optimize(module, normfuse.Config(layernorm_to_rmsnorm="exact"), args=(x,))
    assert report.converted == 5
    assert any("computes 2 nn.TransformerEncoderLayer by an operator" in note for note in report.notes)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(result(x, PADDING), module(x, PADDING), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_approximated_layers_are_not_computed_by_an_operator_of_torch() -> None:
    module, given = drawn(Encoder(False)), [(torch.randn(2, 5, D),) for _ in range(8)]
    config = normfuse.Config(layernorm_to_rmsnorm="approximate", tolerance=9.0)
    result, report = normfuse.optimize(module, config, args=given[0], calibration=given)
    assert report.converted == 5 and not any("TransformerEncoderLayer" in note for note in report.notes)
    for padding in (None, PADDING):
        with torch.no_grad():
            found, other = result(*given[0], padding), module(*given[0], padding)
        torch.testing.assert_close(found, result(*given[0], padding))  # with gradients, part by part
        assert (found - other)[:, :3].abs().max() > 1e-3


class AlsoPlain(nn.Module):
    """It gives out the norm of each head with and without its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, D))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.layer_norm(x, (D,))
        return h * self.weight, h


def test_a_module_that_gives_out_the_norm_without_its_weight_stays() -> None:
    module = nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.Unflatten(1, (2, D)), AlsoPlain())
    x = torch.randn(3, D)
    result, report = normfuse.optimize(module.eval(), normfuse.Config(layernorm_to_rmsnorm="exact"), args=(x,))
    assert report.converted == 1 and [r.code for r in report.refusals] == ["NF301"]
    torch.testing.assert_close(result(x), module(x))


def test_weights_of_heads_are_traced() -> None:
    norm, x = normfuse.nn.RMSNorm(D, 1e-5, nn.Parameter(torch.randn(2, D))), torch.randn(3, 2, D)
    torch.testing.assert_close(torch.fx.symbolic_trace(norm)(x), norm(x))


def test_a_buffer_that_is_not_saved_nor_written_is_no_state() -> None:
    module: Any = nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D))
    module[1].register_buffer("note", torch.zeros(3), persistent=False)
    config = normfuse.Config(layernorm_to_rmsnorm="exact")
    assert normfuse.optimize(module.eval(), config, args=(torch.randn(2, D),))[1].converted == 1
