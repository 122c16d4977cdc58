"""Norms written in place, with torch's methods that end in _ and with +=: found where nobody else sees the write."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F  # noqa: N812

import normfuse
from normfuse.frontends.fx_effects import name_of
from normfuse.frontends.fx_inplace import read_as_pure, write_again, writes

N = 16
EPS = 1e-6
Program = Callable[[Tensor, Tensor, Tensor], Any]


def last() -> normfuse.Report:
    report = normfuse.last_report()
    assert report is not None
    return report


def compiled(f: Any, inner: str = "aot_eager") -> Any:
    torch._dynamo.reset()
    return torch.compile(f, backend="normfuse", options={"inner": inner})


def given(dtype: torch.dtype = torch.float32, scale: float = 1.0, shift: float = 0.0) -> list[Tensor]:
    torch.manual_seed(0)
    return [(torch.randn(3, 7, N) * scale + shift).to(dtype), torch.randn(3, 7, N).to(dtype), torch.rand(N).to(dtype)]


def exported(f: Program, arguments: list[Tensor]) -> tuple[Any, normfuse.Report]:
    class Module(nn.Module):
        def forward(self, x: Tensor, r: Tensor, w: Tensor) -> Any:
            return f(x, r, w)

    return normfuse.optimize(torch.export.export(Module(), tuple(arguments)))


def through(door: str, f: Program, arguments: list[Tensor]) -> tuple[Any, normfuse.Report]:
    """What a program gives behind one of the doors, without gradients, and the report."""
    with torch.no_grad():
        if door == "export":
            program, report = exported(f, arguments)
            return program.module()(*arguments), report
        return compiled(f, door)(*arguments), last()


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


def calls(program: Any) -> list[str | None]:
    return [name_of(n) for n in program.graph.nodes if n.op == "call_function"]


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


# -- what is read after the last write ---------------------------------------------------------------------------------


def token(x: Tensor, r: Tensor, w: Tensor) -> Any:
    h = x.sin()
    h[r > 0.5] = w[0]
    return F.layer_norm(h, (N,), w)


def joined(x: Tensor, r: Tensor, w: Tensor) -> Any:
    h = x.new_zeros(x.shape)
    h[:, :3] = x[:, :3].sin()
    h[:, 3:] = r[:, 3:]
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS) * w


def view_of_it(x: Tensor, r: Tensor, w: Tensor) -> Any:
    h = x.sin()
    v = h.view(21, N)
    h[:, 0] = 0.0
    h.masked_fill_(r > 1.0, 0.5)
    return v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + EPS) * w, h


def input_is_written(x: Tensor, r: Tensor, w: Tensor) -> Any:
    x[:, 1].copy_(r[:, 2])
    return F.rms_norm(x, (N,), w, EPS)


def filled(x: Tensor, r: Tensor, w: Tensor) -> Any:
    h = torch.empty_like(x)
    h.copy_(x).index_fill_(1, torch.tensor([2]), 0.5)
    s = h + r
    return s, s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + EPS) * w


@pytest.mark.parametrize("door", ["aot_eager", "eager", "export"])
@pytest.mark.parametrize("f", [token, joined, view_of_it, input_is_written, filled])
def test_a_norm_of_what_was_written_for_the_last_time(f: Program, door: str) -> None:
    arguments = given()
    want = f(*[t.clone() for t in arguments])
    got, report = through(door, f, arguments)
    torch.testing.assert_close(got, want)
    assert len(report.norms) == 1 and not report.refusals
    if door == "export":
        assert "alias" not in calls(exported(f, given())[0])


@pytest.mark.parametrize("f", [joined, filled])
def test_gradients_of_it(f: Program) -> None:
    arguments, others = ([t.requires_grad_() for t in given()] for _ in range(2))
    for given_, program in ((arguments, f), (others, compiled(f))):
        out = program(*given_)
        sum(t.sin().sum() for t in (out if isinstance(out, tuple) else (out,))).backward()
    assert len(last().norms) == 1
    for a, b in zip(arguments, others, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def written_between(x: Tensor, r: Tensor, w: Tensor) -> Any:
    h = x.sin()
    h[:, 0] = 0.0
    v = h.pow(2).mean(-1, keepdim=True)
    h[:, 1] = 0.0
    return h * torch.rsqrt(v + EPS) * w


def written_after(x: Tensor, r: Tensor, w: Tensor) -> Any:
    h = x.sin()
    h[:, 0] = 0.0
    y = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS) * w
    h[:, 1] = 0.0
    return y, h


def turned(x: Tensor, r: Tensor, w: Tensor) -> Any:
    h = x[:, :3, :3].sin()
    h[0] = 0.5
    h.transpose_(1, 2)
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)


def unknown(x: Tensor, r: Tensor, w: Tensor) -> Any:
    """What writes by a view that was made before."""
    h = x.sin()
    v = h[:, 2]
    h[:, 0] = 0.0
    y = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    v.exp_()
    return y, h.cos()


@pytest.mark.parametrize("door", ["eager", "export"])
@pytest.mark.parametrize("f", [written_between, written_after, unknown])
def test_a_norm_of_what_is_written_once_more(f: Program, door: str) -> None:
    want = f(*given())
    got, report = through(door, f, given())
    torch.testing.assert_close(got, want)
    assert not report.norms


@pytest.mark.parametrize("door", ["aot_eager", "eager", "export"])
def test_a_write_that_changes_the_shape(door: str) -> None:
    torch.testing.assert_close(through(door, turned, given())[0], turned(*given()))


def test_a_conversion_of_it() -> None:
    """An operator that takes the mean away would have to stand behind the write."""
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(N, N), nn.LayerNorm(N), nn.Linear(N, N)

        def forward(self, x: Tensor) -> Any:
            h = self.first(x)
            h[:, 0] = 1.5
            return self.last(self.norm(h))

    torch.manual_seed(0)
    model, x = Model(), torch.randn(3, 7, N) + 2.0
    for force in (False, True):
        config = normfuse.Config(layernorm_to_rmsnorm="exact", force=force)
        program, report = normfuse.optimize(torch.export.export(model, (x,)), config)
        assert len(report.norms) == 1
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


# -- random programs --------------------------------------------------------------------------------------------------


def random_program(seed: int) -> Program:
    """Tensors made, viewed, written and normalised at random; some are given back."""
    draw = random.Random(seed)
    steps: list[tuple[str, Any, Any]] = []
    kinds = "sin view half scale plus times norm_ norm norm_ norm norm keep root detach same put mask copy".split()
    for _ in range(draw.randrange(6, 14)):
        steps.append((draw.choice(kinds), draw.random(), draw.random()))

    def program(x: Tensor, r: Tensor, w: Tensor) -> Any:
        have, out = [x.sin(), r.cos()], []
        for kind, i, j in steps:
            a, b = have[int(i * len(have))], have[int(j * len(have))]
            b = b.reshape(a.shape) if b.shape.numel() == a.shape.numel() else w
            if kind == "sin":
                have.append(a.sin())
            elif kind == "view":
                have.append(a.view(-1, N))
            elif kind == "half":
                have.append(a[1:] if a.shape[0] > 1 else a)
            elif kind == "scale":
                a.mul_(w)
            elif kind == "plus":
                a += 0.5
            elif kind == "times" and b is not a:
                have.append(a.add(b))
                a.mul_(0.5)
            elif kind == "norm_":
                a.mul_(a.pow(2).mean(-1, keepdim=True).add_(EPS).rsqrt_())
            elif kind == "norm":
                v = a.pow(2).mean(-1, keepdim=True)
                v += EPS
                have.append(a * v.rsqrt_() * w)
            elif kind == "keep":
                out.append(a)
            elif kind == "root":
                have.append(a.abs().sqrt_())
            elif kind == "detach":
                have.append(a.detach())
            elif kind == "same":
                have.append(a.contiguous())
            elif kind == "put":
                a[..., int(j * N)] = 0.25
            elif kind == "mask":
                a.masked_fill_(a > 0.9, 0.5)
            elif kind == "copy":
                a[:1].copy_(w)
        return (*out, have[-1].cos(), have[0].sin())

    return program


@pytest.mark.parametrize("seeds", [range(i, i + 20) for i in range(0, 60, 20)], ids=str)
def test_random_programs(seeds: range) -> None:
    found = 0
    with torch.no_grad():
        for seed in seeds:
            f = random_program(seed)
            want = [t.clone() for t in f(*given())]
            assert len(want) >= 2
            program, report = exported(f, given())
            for got in (program.module()(*given()), compiled(f, "eager")(*given())):
                for a, b in zip(got, want, strict=True):
                    torch.testing.assert_close(a, b, msg=f"seed {seed}")
            found += sum(n.action == "fused" for n in report.norms)
    assert found >= 10
