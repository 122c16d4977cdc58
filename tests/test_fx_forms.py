"""What a norm becomes in a torch graph by its types, shapes and parameters, and what is refused."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.shape_prop import ShapeProp

import normfuse
from normfuse.frontends import fx_emit
from normfuse.norm import Norm
from normfuse.report import Report
from tests.families import FAMILIES
from tests.traced import BRAIN, SINGLE, ULP, NearMissModule, Rewritten, rms, rewriting, silent

FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], torch.dtype, str]] = {
    "weight after the cast": (lambda x, w: w.bfloat16() * rms(x.float()).bfloat16(), BRAIN, "rms_norm, mul"),
    "weight before the cast": (lambda x, w: (w * rms(x.float())).to(x.dtype), BRAIN, "to, rms_norm, to"),
    "half weight before the cast": (
        lambda x, w: (w.bfloat16().float() * rms(x.float())).to(x.dtype), BRAIN, "rms_norm",
    ),
    "stays in float32": (lambda x, w: w * rms(x.float()), BRAIN, "to, rms_norm"),
    "no weight": (lambda x, w: rms(x.float()).to(x.dtype), BRAIN, "rms_norm"),
    "bias": (lambda x, w: rms(x) * w + w, SINGLE, "rms_norm, add"),
    "constant weight": (lambda x, w: rms(x) * 3.0, SINGLE, "rms_norm, mul"),
    "scaled weight": (lambda x, w: rms(x) * w * 3.0, SINGLE, "mul, rms_norm"),
    "half weight": (lambda x, w: rms(x) * w.bfloat16(), SINGLE, "to, rms_norm"),
    "weight in a row": (lambda x, w: rms(x) * w.view(1, 1, 64), SINGLE, "reshape, rms_norm"),
    "two axes, one weighted": (
        lambda x, w: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + 1e-6) * w, SINGLE, "expand, rms_norm",
    ),
    "float64 inside": (lambda x, w: rms(x.double()).float() * w, SINGLE, "to, rms_norm, to, mul"),
    "permuted": (lambda x, w: rms(x.view(2, 5, 4, 16).transpose(1, 2)), SINGLE, "permute, rms_norm, permute"),
}  # fmt: skip


@pytest.mark.parametrize("how", ["dynamo", "export", "aot"])
@pytest.mark.parametrize("form", FORMS)
def test_form(form: str, how: str) -> None:
    """Each order of casts has its own nodes, and keeps types, strides and, for half types, every bit."""
    fn, dtype, emitted = FORMS[form]
    module, x = NearMissModule(fn), torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(4)).to(dtype)
    found = Rewritten(module, (x,), how)
    assert [n.action for n in found.norms] == ["fused"], found.reports[0].refusals
    core = {"_to_copy": "to", "_fused_rms_norm": "rms_norm", "view": "reshape"}
    assert ", ".join(core.get(op, op) for op in found.norms[0].emitted.split(", ")) == emitted
    want, got = module(x), found(x)
    assert (got.dtype, got.stride()) == (want.dtype, want.stride())
    if dtype == BRAIN and want.dtype == BRAIN:
        assert torch.equal(want, got)
    assert (got - want).abs().max() <= 8 * ULP[SINGLE] * want.abs().max()


def test_a_norm_over_the_last_axis_of_open_size() -> None:
    program = torch.export.export(
        NearMissModule(lambda x, w: rms(x)), (torch.randn(3, 5),),
        dynamic_shapes={"x": {1: torch.export.Dim("width", min=2)}},
    )  # fmt: skip
    new, report = normfuse.optimize(program)
    assert report.fused == 1 and report.norms[0].size is None
    x = torch.randn(3, 11)
    assert (new.module()(x) - rms(x)).abs().max() < 1e-6


def test_operators_state_their_fact() -> None:
    """layer_norm and rms_norm as functions, modules and aten operators are norms already."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.linear = nn.LayerNorm(64), nn.RMSNorm(64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.second(x + self.linear(self.first(x)))
            return out

    module, x = Two().eval(), torch.randn(2, 64)
    traced = fx.symbolic_trace(module)
    ShapeProp(traced).propagate(x)
    for graph in (traced, Rewritten(module, (x,), "dynamo").before[0], torch.export.export(module, (x,))):
        report = normfuse.inspect(graph)
        assert [(n.kind, n.form) for n in report.norms] == [("layer_norm", "op"), ("rms_norm", "op")]
        assert [n.eps for n in report.norms] == [1e-5, pytest.approx(2.0**-23)]


def test_scaled_module_takes_its_parameter_from_the_module() -> None:
    norm = nn.LayerNorm(64).eval()
    nn.init.normal_(norm.weight)
    module, x = nn.Sequential(norm), torch.randn(3, 64)
    graph = fx.Graph()
    graph.output(graph.call_function(operator.mul, (graph.call_module("0", (graph.placeholder("x"),)), 2.0)))
    traced = fx.GraphModule(module, graph)
    ShapeProp(traced).propagate(x)
    new, report = normfuse.optimize(traced)
    assert report.fused == 1 and "call_module" not in {n.op for n in new.graph.nodes}
    assert (new(x) - traced(x)).abs().max() < 1e-5


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_graph_without_shapes_is_refused() -> None:
    traced = fx.symbolic_trace(NearMissModule(lambda x, w: rms(x) * w))
    new, report = normfuse.optimize(traced)
    assert [r.code for r in report.refusals] == ["NF115"] and not report.norms
    assert str(new.graph) == str(traced.graph)


def no_grad_half(x: Tensor, w: Tensor) -> Tensor:
    """The statistics without a gradient."""
    with torch.no_grad():
        rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x * rstd * w


def inner_output(x: Tensor, w: Tensor) -> Tensor:
    """The root mean square is used again."""
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x * rstd * w + rstd


def weight_written_later(x: Tensor, w: Tensor) -> Tensor:
    """The weight is multiplied in, then overwritten, before the norm is complete."""
    k = w.clone()
    y = x * k
    k.zero_()
    return y * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def added_in_place(x: Tensor, w: Tensor) -> Tensor:
    """What an embedding with positions added in place gives."""
    h = x.clone()
    h += 1.5
    return rms(h) * w


def filled_by_parts(x: Tensor, w: Tensor) -> Tensor:
    """A view of what a loop has filled, as of linear attention in chunks."""
    h = torch.zeros_like(x)
    for i in range(2):
        h[i] = x[i] * (i + 1)
    return rms(h.reshape(-1, 64)) * w


def filled_after_the_view(x: Tensor, w: Tensor) -> Tensor:
    """The same view, made before the last part is there, and read after it."""
    h = torch.zeros_like(x)
    h[0] = x[0]
    view = h.view(-1, 64)
    square = view.pow(2)
    h[1] = x[1]
    return view * torch.rsqrt(square.mean(-1, keepdim=True) + 1e-6) * w


def scaled_in_place(x: Tensor, w: Tensor) -> Tensor:
    """The result of a norm is written over, and read before and after that."""
    y = (rms(x) * w).type_as(x)
    before = y * 2
    y *= 0.5
    y += x
    return y + before


def normalised_and_written(x: Tensor, w: Tensor) -> Tensor:
    """The same of an operator."""
    y = nn.functional.layer_norm(x, (64,), w)
    y += x
    return y


@pytest.mark.parametrize("how", ["dynamo", "export"])
@pytest.mark.parametrize(("fn", "count"), [
    (added_in_place, 1), (filled_by_parts, 1), (filled_after_the_view, 0), (scaled_in_place, 1),
])  # fmt: skip
def test_a_norm_beside_writes_in_place(fn: Callable[..., Any], count: int, how: str) -> None:
    module, x = NearMissModule(fn), torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(5))
    found = Rewritten(module, (x,), how)
    assert [n.action for n in found.norms] == ["fused"] * count
    assert (found(x) - module(x)).abs().max() <= 8 * ULP[SINGLE] * module(x).abs().max()
    assert [n.action for n in Rewritten(NearMissModule(normalised_and_written), (x,), how).norms] == ["kept"]


REFUSED = {
    "no_grad inside": (no_grad_half, True, "NF202"),
    "an inner value is used": (inner_output, False, "NF116"),
    "the weight is written": (weight_written_later, False, "NF120"),
    "detached statistics": (lambda x, w: x * torch.rsqrt(x.detach().pow(2).mean(-1, keepdim=True) + 1e-6) * w,
                            True, "NF106"),
    "computed in bfloat16": (lambda x, w: rms(x.bfloat16() * 2.5) * w, False, "NF202"),
    "inner axes": (lambda x, w: x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6), False, "NF202"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    fn, grad, code = REFUSED[case]
    module, x = NearMissModule(fn), torch.randn(4, 64)
    reports: list[Report] = []
    torch._dynamo.reset()
    with silent(), torch.set_grad_enabled(grad):
        got = torch.compile(module, backend=rewriting(reports))(x.requires_grad_(grad))
        assert torch.equal(got, module(x))
    assert not reports[0].fused
    assert code in {r.code for r in reports[0].refusals}


def switched(y: Tensor, w: Tensor) -> Tensor:
    """What autocast may not touch, which is no part of the norm behind it."""
    with torch.autocast("cpu", enabled=False):
        turned = torch.cos(w)
    return rms(y) * w + turned


def copied_without_gradient(x: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        y = x + 0
    return rms(y) * w + x


def copied_half(x: Tensor, w: Tensor) -> Tensor:
    """The statistics are of x itself."""
    with torch.no_grad():
        y = x + 0
    return y * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w


def copied_inside(x: Tensor, w: Tensor) -> Tensor:
    """A copy, and a step of the norm."""
    with torch.no_grad():
        y = x + 0
        square = y.pow(2)
    return y * torch.rsqrt(square.mean(-1, keepdim=True) + 1e-6) * w + x


@pytest.mark.parametrize(("fn", "fused"), [
    (lambda x, w: switched(torch.tanh(x), w), 1), (lambda x, w: switched(torch.tanh(x) + 0, w), 1),
    (lambda x, w: switched(F.dropout(torch.tanh(x) + 0, 0.1, False), w), 1), (copied_without_gradient, 1),
    (lambda x, w: copied_without_gradient(torch.tanh(x), w), 1), (copied_half, 0), (copied_inside, 0),
])  # fmt: skip
def test_a_copy_ahead_of_a_switch(fn: Callable[..., Any], fused: int) -> None:
    """The operator reads the copy, through which there may be no gradient."""
    module, x, reports = NearMissModule(fn), torch.randn(4, 64), list[Report]()
    torch._dynamo.reset()
    grads = []
    for run in (module, torch.compile(module, backend=rewriting(reports))):
        own = x.clone().requires_grad_()
        with silent():
            out = run(own)
        out.square().sum().backward()
        grads += [out.detach(), own.grad if own.grad is not None else torch.zeros(0)]
    assert reports[0].fused == fused and (fused or "NF202" in {r.code for r in reports[0].refusals})
    torch.testing.assert_close(grads[2:], grads[:2], rtol=1e-5, atol=1e-5)


def test_a_wrong_replacement_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check runs the model's own nodes, so that it sees a mistake of the recogniser too."""
    emit = fx_emit.Emitter.emit

    def wrong(self: fx_emit.Emitter, graph: fx.Graph, norm: Norm, *rest: Any) -> list[fx.Node]:
        nodes = emit(self, graph, norm, *rest)
        target = nodes[0]
        target.args = (*target.args[:-1], 0.5)
        return nodes

    monkeypatch.setattr(fx_emit.Emitter, "emit", wrong)
    module, x = NearMissModule(lambda x, w: rms(x) * w), torch.randn(4, 64)
    found = Rewritten(module, (x,), "dynamo")
    assert found.codes == ["NF201"] and found.norms[0].action == "refused"
    assert torch.equal(found(x), module(x))


def centred(x: Tensor, w: Tensor) -> Tensor:
    d = x - x.mean(-1, keepdim=True)
    return d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + 1e-5) * w


def in_one_pass(x: Tensor, w: Tensor) -> Tensor:
    m = x.mean(-1, keepdim=True)
    return (x - m) / torch.sqrt(x.pow(2).mean(-1, keepdim=True) - m * m + 1e-5) * w


@pytest.mark.parametrize("change", [1.0, 1 + 1e-9, 0.0])
@pytest.mark.parametrize("fn", [centred, in_one_pass, lambda x, w: rms(x) * w,
                                lambda x, w: F.layer_norm(x, (64,), eps=1e-6) * w])  # fmt: skip
def test_a_norm_in_float64(fn: Callable[..., Any], change: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no errors beside itself; a wrong eps, or statistics in float32, are more than a rounding."""
    emit = fx_emit.Emitter.emit

    def wrong(self: fx_emit.Emitter, graph: fx.Graph, norm: Norm, x: fx.Node, *rest: Any) -> list[fx.Node]:
        if not change:
            x = graph.call_method("to", (graph.call_method("to", (x, torch.float32)), torch.float64))
        nodes = emit(self, graph, norm, x, *rest)
        (target,) = (n for n in nodes if n.target in (F.layer_norm, F.rms_norm))
        target.args = (*target.args[:-1], norm.eps * (change or 1.0))
        return nodes

    monkeypatch.setattr(fx_emit.Emitter, "emit", wrong)
    module = NearMissModule(fn).double()
    x = torch.randn(4, 64, dtype=torch.float64) * 1e-3
    found = Rewritten(module, (x,), "dynamo")
    assert found.codes == ([] if change == 1 else ["NF202"])
    assert found.norms[0].action == ("fused" if change == 1 else "refused")
    assert (found(x) - module(x)).abs().max() < 1e-13


def test_a_guard_on_eps() -> None:
    """What was read while compiling is compiled again when it changes."""

    class Norm(nn.Module):
        eps = 1e-5

        def forward(self, x: Tensor) -> Tensor:
            return rms(x, self.eps)

    module, x = Norm(), torch.randn(3, 64) * 1e-2
    found = Rewritten(module, (x,), "dynamo", dynamic=True)
    assert found.norms[0].eps == 1e-5 and found.norms[0].action == "fused"
    module.eps = 1e-2
    assert (found(x) - rms(x, 1e-2)).abs().max() < 1e-6


@pytest.mark.parametrize("how", ["dynamo", "export"])
def test_a_rewritten_graph_is_left_alone(how: str) -> None:
    module = FAMILIES["qwen3"].build()
    found = Rewritten(module, FAMILIES["qwen3"].args(), how)
    again, report = normfuse.optimize(found.after[0])
    assert not report.fused and len(report.norms) == FAMILIES["qwen3"].norms
    assert str(again.graph) == str(found.after[0].graph)


@pytest.mark.parametrize("how", ["dynamo", "aot", "export"])
@pytest.mark.parametrize(
    "after", [lambda y, w: y * 1000.0, lambda y, w: y * w, lambda y, w: y + w], ids=["number", "weight", "bias"]
)
def test_a_norm_that_is_scaled_in_a_wider_type_behind_the_cast_back(how: str, after: Any) -> None:
    """It keeps that type, which a number alone does not give, and does not overflow where the model does not."""

    def spell(x: Tensor, w: Tensor) -> Tensor:
        y = x.float()
        out: Tensor = after((y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).half().float(), 100 * w)
        return out

    module, x = NearMissModule(spell), torch.randn(4, 64).half()
    x[0, 1:] = 0  # a spike: 8 in the norm
    x[1, 0] = 1000
    found, want = Rewritten(module, (x,), how, normfuse.Config(verify="off")), module(x)
    got = found(x)
    assert found.norms[0].action == "fused" and got.dtype == want.dtype == SINGLE
    assert ((got - want).abs() <= 2.0**-10 * want.abs() + 1e-6).all()


def test_a_replacement_of_another_type_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although its numbers are near enough."""
    emit = fx_emit.Emitter.emit

    def wrong(self: Any, graph: fx.Graph, *args: Any) -> list[fx.Node]:
        nodes = emit(self, graph, *args)
        return [*nodes, graph.call_method("double", (nodes[-1],))]

    monkeypatch.setattr(fx_emit.Emitter, "emit", wrong)
    found = Rewritten(NearMissModule(lambda x, w: F.silu(rms(x) * w)), (torch.randn(4, 64),), "export")
    assert found.codes == ["NF201"] and found.norms[0].action == "refused"
    assert "gives torch.float64 instead of torch.float32" in found.reports[0].refusals[0].message


def scaled(x: Tensor, w: Tensor) -> Tensor:
    """Unbiased: torch's operator, and a factor."""
    c = x - x.mean(-1, keepdim=True)
    return F.silu(c / (c.pow(2).sum(-1, keepdim=True) / 63 + 1e-3).sqrt())


def widened(x: Tensor, w: Tensor) -> Tensor:
    """A cast, torch's operator with a weight in float32, a cast."""
    y = x.bfloat16().float()
    return F.silu((y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * w).bfloat16())


def doubled(x: Tensor, w: Tensor) -> Tensor:
    """A factor of two behind the cast back, which is read again as one before it."""
    y = x.double()
    n = (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).float()
    return F.silu(n + n)


@pytest.mark.parametrize("form", [scaled, widened, doubled])
@pytest.mark.parametrize("how", ["shapes", "values", "fake", "export"])
def test_a_norm_in_several_nodes_is_left_alone(form: Callable[[Tensor, Tensor], Tensor], how: str) -> None:
    """It is found again, whatever kind of metadata the graph has, and stays as it was written."""
    module, x = NearMissModule(form), torch.randn(2, 64)
    model: Any
    if how == "export":
        model = torch.export.export(module, (x,))
    else:
        model = fx.symbolic_trace(module)
        ShapeProp(model).propagate(x)
        with FakeTensorMode() if how == "fake" else contextlib.nullcontext():
            for node in model.graph.nodes:
                if how != "shapes" and "tensor_meta" in node.meta:
                    meta = node.meta["tensor_meta"]
                    node.meta["val"] = torch.ones(meta.shape, dtype=meta.dtype)
    first, before = normfuse.optimize(model)
    second, after = normfuse.optimize(first)
    assert before.fused == 1 and "," in str(before.norms[0].emitted)
    assert (after.fused, [n.action for n in after.norms]) == (0, ["kept"])
    assert str(second.graph) == str(first.graph)


def test_gradients_flow_through_the_operator() -> None:
    module, x = NearMissModule(lambda x, w: F.silu(rms(x) * w)), torch.randn(4, 64, requires_grad=True)
    module.w.requires_grad_(True)
    module(x).sum().backward()
    want = (x.grad, module.w.grad)
    x.grad = module.w.grad = None
    reports: list[Report] = []
    torch._dynamo.reset()
    with silent():
        torch.compile(module, backend=rewriting(reports))(x).sum().backward()
    assert reports[0].fused == 1
    for a, b in zip(want, (x.grad, module.w.grad), strict=True):
        assert a is not None and b is not None and (a - b).abs().max() < 1e-4


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan"), 1e308, 1e-320])
def test_numbers_beyond_all_arithmetic(number: float) -> None:
    """A norm times such a number, to its power, or with it added is read without an error."""

    class Beyond(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            s = x.pow(2).mean(-1, keepdim=True)
            y = x * torch.rsqrt(s + 1e-5)
            return y * number, (s * number * number) ** -2, s**number, x / torch.sqrt(s + number), y + number

    report = normfuse.inspect(torch.export.export(Beyond(), (torch.ones(2, 8),)))
    assert len(report.norms) >= 1


@pytest.mark.parametrize("equation", ["bsd->dbs", "bsd->sbd", "bsd,bdt->bts", "bsd,tbd->bst"])
def test_an_einsum_that_is_no_product_of_rows(equation: str) -> None:
    """Beside a norm: it turns its operand, or multiplies other axes than a matrix product, which the algebra knows."""
    class Turned(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w
            other = [x, x.transpose(1, 2) if equation == "bsd,bdt->bts" else x.transpose(0, 1)]
            return y, torch.einsum(equation, *other[: equation.count(",") + 1])

    program = torch.export.export(Turned(), (torch.randn(2, 5, 8), torch.ones(8)))
    (norm,) = normfuse.inspect(program).norms
    assert norm.kind == "rms_norm"


@pytest.mark.parametrize("spread", [
    lambda s: s.tile(8), lambda s: s.tile(1, 1, 8), lambda s: s.repeat(1, 1, 8), lambda s: s.repeat_interleave(8, -1),
])  # fmt: skip
def test_statistics_that_are_repeated_for_each_channel(spread: Callable[[Tensor], Tensor]) -> None:
    class Spread(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            d = x - spread(x.mean(-1, keepdim=True))
            return d * torch.rsqrt(spread(d.square().mean(-1, keepdim=True)) + 1e-6) * w

    args = torch.randn(2, 5, 8), torch.rand(8)
    made, report = normfuse.optimize(torch.export.export(Spread(), args))
    assert [(n.kind, n.action, n.verified) for n in report.norms] == [("layer_norm", "fused", True)]
    torch.testing.assert_close(made.module()(*args), Spread()(*args))


@pytest.mark.parametrize(("pool", "norms"), [
    (lambda s: F.avg_pool1d(s, 8), 1), (lambda s: F.avg_pool1d(s, 8, 1, padding=0), 1),
    (lambda s: F.avg_pool1d(s, 7, 2), 0), (lambda s: F.avg_pool1d(s, 8, 2, padding=1)[..., :1], 0),
    (lambda s: F.avg_pool2d(s, (1, 8)), 0), (lambda s: F.avg_pool2d(s[:, None], (5, 8)).squeeze(1), 1),
    (lambda s: F.avg_pool2d(s, (5, 8), divisor_override=39), 0)])  # fmt: skip
def test_a_pool_over_all_of_an_axis(pool: Callable[[Tensor], Tensor], norms: int) -> None:
    class Pooled(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return x * torch.rsqrt(pool(x * x) + 1e-6) * w

    args = torch.randn(2, 5, 8), torch.rand(8)
    made, report = normfuse.optimize(torch.export.export(Pooled(), args))
    assert len(report.norms) == norms and all(n.action == "fused" for n in report.norms)
    torch.testing.assert_close(made.module()(*args), Pooled()(*args))


@pytest.mark.parametrize("spread", [
    lambda s: s.tile(4), lambda s: s.repeat(1, 1, 4), lambda s: s.repeat_interleave(4, -1),
])  # fmt: skip
def test_statistics_of_groups_that_are_repeated_are_no_norms(spread: Callable[[Tensor], Tensor]) -> None:
    class Groups(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(spread(x.view(2, 5, 2, 4).square().mean(-1)) + 1e-6)

    assert not normfuse.inspect(torch.export.export(Groups(), (torch.randn(2, 5, 8),))).norms


@pytest.mark.parametrize(("counts", "dim"), [([2, 0], 0), ([2, 0, 1, 1], 1)])
@pytest.mark.parametrize("verify", ["off", "sites"])
def test_rows_that_are_repeated_each_another_time_are_others(counts: list[int], dim: int, verify: Any) -> None:
    """Though the shape stays what it was."""
    class Counted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("counts", torch.tensor(counts))

        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(self.counts, Tensor)
            other = x.repeat_interleave(self.counts, dim, output_size=len(counts))
            return x * torch.rsqrt(other.square().mean(-1, keepdim=True) + 1e-6)

    x = torch.randn(2, 4)
    made, report = normfuse.optimize(torch.export.export(Counted(), (x,)), normfuse.Config(verify=verify))
    assert not report.norms
    torch.testing.assert_close(made.module()(x), Counted()(x))
