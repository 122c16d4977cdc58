"""Norms written in place, with torch's methods that end in _ and with +=: found where nobody else sees the write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F  # noqa: N812

import normfuse
from normfuse.frontends.fx_inplace import read_as_pure, write_again, writes
from tests.compiling import compiled, last
from tests.in_place import EPS, N, Program, calls, exported, given, through

# -- norms that are found ---------------------------------------------------------------------------------------------


def method(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    h = x.sin()
    return h * h.pow(2).mean(-1, keepdim=True).add_(EPS).rsqrt_() * w


def augmented(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    h = x.sin()
    v = h.square().mean(-1, keepdim=True)
    v += EPS
    h = h / v.sqrt_()
    h *= w
    return h


def all_of_it(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    h = x.sin()
    h -= h.mean(-1, keepdim=True)
    h /= torch.sqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    h *= w
    return h


def old_name(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    h = x.sin()
    h.mul_(torch.rsqrt_(h.pow(2).mean(-1, keepdim=True).add_(EPS)))
    h.mul_(w)
    return h.cos()


def divided(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    h = x.sin()
    s = (h * h).sum(-1, keepdim=True).div_(N).add_(EPS)
    return h.mul(s.pow_(-0.5)).mul_(w).neg_()


def in_a_view(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    h = x.sin().view(21, N)
    return h.mul_(h.pow(2).mean(-1, keepdim=True).add_(EPS).rsqrt_()).view(3, 7, N) * w


def summed(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    s = x.sin()
    s += r
    return s * s.pow(2).mean(-1, keepdim=True).add_(EPS).rsqrt_() * w, s


def cast(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    h = x.to(torch.float64)
    h *= h.pow(2).mean(-1, keepdim=True).add_(EPS).rsqrt_()
    return h.to(x.dtype) * w


FOUND = [method, augmented, all_of_it, old_name, divided, in_a_view, summed]


@pytest.mark.parametrize("door", ["aot_eager", "eager", "export"])
@pytest.mark.parametrize("f", FOUND)
def test_norms_in_place_are_found(f: Program, door: str) -> None:
    for arguments in (given(), given(scale=1e-4), given(shift=1.5, scale=1e-3)):
        wide = f(*(t.double() for t in arguments))
        want = f(*(t.clone() for t in arguments))
        got, report = through(door, f, arguments)
        assert [n.action for n in report.norms] == ["fused"], report.refusals
        for a, b, c in zip(*([t] if isinstance(t, Tensor) else t for t in (got, want, wide)), strict=True):
            assert (a - c).abs().max() <= 2 * (b - c).abs().max() + 1e-6 * c.abs().max()
    if f is summed:
        assert report.norms[0].emitted == "normfuse.add_rms_norm"


@pytest.mark.parametrize("f", FOUND)
def test_their_gradients(f: Program) -> None:
    if f in (all_of_it, old_name, in_a_view):  # autograd refuses these
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            x, *others = given()
            torch.autograd.grad(f(x.requires_grad_(), *others).sum(), x)
        return

    def gradients(g: Any) -> list[Tensor]:
        arguments = [t.requires_grad_() for t in given()]
        out = g(*arguments)
        out = torch.cat([t.flatten() for t in out]) if isinstance(out, tuple) else out
        return list(torch.autograd.grad(out.sin().sum(), arguments, allow_unused=True, materialize_grads=True))

    for a, b in zip(gradients(compiled(f)), gradients(f), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert len(last().norms) == 1


def test_half_precision() -> None:
    """Autocast computes rsqrt in float32, and rsqrt_ where it stands: what it widens is left alone in narrow types."""
    x, r, w = given(torch.bfloat16)

    def narrow(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        h = x.sin()
        return h * h.pow(2).mean(-1, keepdim=True).add_(EPS).rsqrt_() * w

    def wide(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        h = x.sin().float()
        h = h.mul_(h.pow(2).mean(-1, keepdim=True).add_(EPS).rsqrt_()).to(x.dtype)
        h *= w
        return h

    with torch.no_grad():
        torch.testing.assert_close(compiled(narrow)(x, r, w), narrow(x, r, w), rtol=0, atol=0)
        assert not last().norms
        torch.testing.assert_close(compiled(wide)(x, r, w), wide(x, r, w), rtol=0, atol=2.0**-7)
        assert [n.action for n in last().norms] == ["fused"]


# -- writes that somebody sees ----------------------------------------------------------------------------------------


def input_(x: Tensor, r: Tensor, w: Tensor) -> Any:
    x.mul_(x.pow(2).mean(-1, keepdim=True).add(EPS).rsqrt())
    return x * w


def view_of_input(x: Tensor, r: Tensor, w: Tensor) -> Any:
    h = x.view(21, N)
    h *= h.pow(2).mean(-1, keepdim=True).add(EPS).rsqrt()
    return h * 2


def view_read_later(x: Tensor, r: Tensor, w: Tensor) -> Any:
    h = x.sin()
    v = h[..., 0]
    h *= h.pow(2).mean(-1, keepdim=True).add(EPS).rsqrt()
    return h, v


def whole_read_later(x: Tensor, r: Tensor, w: Tensor) -> Any:
    h = x.sin()
    v = h[:, :3]
    v *= v.pow(2).mean(-1, keepdim=True).add(EPS).rsqrt()
    return v.cos(), h.cos()


def detached(x: Tensor, r: Tensor, w: Tensor) -> Any:
    h = x.sin()
    h.detach().mul_(h.pow(2).mean(-1, keepdim=True).add(EPS).rsqrt())
    return h.cos()


def of_itself(x: Tensor, r: Tensor, w: Tensor) -> Any:
    h = x.sin()[..., :3, :3]
    h += h.transpose(1, 2)
    return h * h.pow(2).mean(-1, keepdim=True).add(EPS).rsqrt()


def maybe_itself(x: Tensor, r: Tensor, w: Tensor) -> Any:
    h = x.contiguous()
    h *= h.pow(2).mean(-1, keepdim=True).add(EPS).rsqrt()
    return h


SEEN = [input_, view_of_input, view_read_later, whole_read_later, detached, maybe_itself]


@pytest.mark.parametrize(("f", "norms", "door"), [
    *((f, 0, door) for f in SEEN for door in ("aot_eager", "eager", "export")),
    (of_itself, 1, "eager"), (of_itself, 1, "export"),  # AOTAutograd computes something else
])  # fmt: skip
def test_a_write_that_somebody_sees_stays_one(f: Program, norms: int, door: str) -> None:
    arguments = given()
    before = [t.clone() for t in arguments]
    want = f(*before)
    got, report = through(door, f, arguments)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(arguments, before)
    assert len(report.norms) <= norms


@pytest.mark.parametrize("view", [
    lambda h: torch.ops.aten._unsafe_view.default(h, [21, N]), lambda h: torch.unsafe_chunk(h, 3, 1)[0],
    lambda h: torch.unsafe_split(h, 2)[0], lambda h: torch.ops.aten.lift.default(h)])  # fmt: skip
def test_a_view_that_no_schema_tells_of(view: Callable[[Tensor], Tensor]) -> None:
    """Without fake tensors there is no memory to compare either."""
    class Module(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            h = x.sin()
            y = view(h)
            y.mul_(torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS))
            return (y * w).cos(), h.cos()

    x, _, w = given()
    graph = fx.symbolic_trace(Module())
    ShapeProp(graph).propagate(x, w)
    with torch.no_grad():
        torch.testing.assert_close(normfuse.optimize(graph)[0](x, w), Module()(x, w))


def test_a_type_that_a_write_rounds_to() -> None:
    def f(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        h = x.sin()
        h *= r.double()
        return F.rms_norm(h, (N,))

    with torch.no_grad():
        torch.testing.assert_close(compiled(f, "eager")(*given()), f(*given()), rtol=0, atol=1e-6)


def test_grad_mode_between() -> None:
    """To autograd a write under no_grad has not happened."""
    def f(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        h = x.sin()
        with torch.no_grad():
            h *= w
        return F.rms_norm(h, (N,))

    def gradient(g: Any) -> Tensor:
        x, r, w = given()
        return torch.autograd.grad(g(x.requires_grad_(), r, w).sin().sum(), x)[0]

    torch.testing.assert_close(gradient(compiled(f, "eager")), gradient(f))


# -- what is left is written in place again ---------------------------------------------------------------------------


def test_what_no_operator_takes_up_is_written_in_place_again() -> None:
    def f(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        h = x.sin().mul_(w)  # before
        h = h * h.pow(2).mean(-1, keepdim=True).add_(EPS).rsqrt_()
        return h.cos().mul_(w).add_(r)  # behind

    program, report = exported(f, given())
    assert [n.action for n in report.norms] == ["fused"]
    assert calls(program) == ["sin", "mul_", "rms_norm", "cos", "mul_", "add_"]
    torch.testing.assert_close(program.module()(*given()), f(*given()))
    again, _ = normfuse.optimize(program)
    assert str(again.graph) == str(program.graph)


def test_memory_that_something_new_reads_or_holds_is_not_written() -> None:
    """A norm saves what it reads for its backward."""
    def f(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        h = x.sin()
        n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
        y = n.cos()
        n *= w[0]
        h += 1.0
        return y, n.sin() + h

    with torch.no_grad():
        program, report = exported(f, given())
    assert [n.action for n in report.norms] == ["fused"]
    assert calls(program) == ["sin", "rms_norm", "cos", "select", "mul", "add", "sin", "add"]
    torch.testing.assert_close(program.module()(*given()), f(*given()))


def test_a_graph_without_such_writes_is_left_alone() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin().relu_().clamp_(min=0.1)

    graph = fx.symbolic_trace(Module()).graph
    assert not writes(graph) and not read_as_pure(graph, False)
    write_again(graph, {}, False, ())
    assert [n.target for n in graph.nodes if n.op == "call_method"] == ["sin", "relu_", "clamp_"]
