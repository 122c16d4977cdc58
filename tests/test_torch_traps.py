"""Torch graphs in which something is written, cut off or read anew that no name tells of, and norms under functorch."""

from __future__ import annotations

import copy
import gc
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F  # noqa: N812

import normfuse
from tests.compiling import EPS, compiled, rms

NN: Any = torch._C._nn


# -- writes -----------------------------------------------------------------------------------------------------------


class Views(nn.Module):
    """A buffer that is a view of another one, which is written."""

    cache: Tensor
    row: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.arange(48.0).reshape(6, 8).sin())
        self.register_buffer("row", self.cache[2:4])

    def forward(self, x: Tensor) -> Tensor:
        v = self.row.pow(2).mean(-1, keepdim=True)
        self.cache.mul_(0.5)
        return x + rms(self.row, v)


def test_buffers_in_the_same_memory() -> None:
    x = torch.ones(2, 8)
    torch.testing.assert_close(compiled(Views())(x), Views()(x))


def foreach(x: Tensor, r: Tensor) -> Tensor:
    v = x.pow(2).mean(-1, keepdim=True)
    torch._foreach_mul_([x], 0.5)
    return r + rms(x, v)


def limited(w: Tensor, r: Tensor) -> Tensor:
    v = w.pow(2).mean(-1, keepdim=True)
    return r + rms(w, v) + F.embedding(torch.tensor([0, 2]), w, max_norm=0.5).sum()


def limited_bag(w: Tensor, r: Tensor) -> Tensor:
    v = w.pow(2).mean(-1, keepdim=True)
    return r + rms(w, v) + F.embedding_bag(torch.tensor([[0, 2]]), w, max_norm=0.5).sum()


@pytest.mark.parametrize("f", [foreach, limited, limited_bag])
def test_a_write_that_no_name_tells_of(f: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    x, r = torch.randn(4, 8), torch.randn(4, 8)
    torch.testing.assert_close(compiled(f)(x.clone(), r), f(x.clone(), r))


class Running(nn.Module):
    """The running statistics of a batch norm, read before it writes them."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.bn: Any = kind(8, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        h = x + x.sin()
        scaled = self.bn.running_var * rms(h)
        found: Tensor = self.bn(x.unsqueeze(-1).repeat(1, 1, 2))[..., 0] + scaled
        return found


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.InstanceNorm1d])
@pytest.mark.parametrize("training", [True, False])
def test_running_statistics(kind: type[nn.Module], training: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    torch.testing.assert_close(compiled(Running(kind).train(training))(x), Running(kind).train(training)(x))


WRITES: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "native": lambda x, h, k: torch.native_batch_norm(x, None, None, k, torch.ones(8), True, 0.5, 1e-5)[0],
    "aten": lambda x, h, k: torch.ops.aten.native_batch_norm(x, None, None, k, torch.ones(8), True, 0.5, 1e-5)[0],
    "update": lambda x, h, k: torch.batch_norm_update_stats(x, k, torch.ones(8), 0.5)[0],
    "noise": lambda x, h, k: NN.rrelu_with_noise(x, h, 0.1, 0.3, True),
    "step": lambda x, h, k: torch._fused_sgd_([x.clone()], [x.clone()], [h], weight_decay=0.0, momentum=0.9, lr=0.1,
                                              dampening=0.0, nesterov=False, maximize=False, is_first_step=False),
    "same": lambda x, h, k: h.conj_physical().add_(1), "dense": lambda x, h, k: h.to_dense().add_(1),
    "product": lambda x, h, k: torch.cartesian_prod(k).add_(1),
    "flat": lambda x, h, k: torch._C._nn.flatten_dense_tensors([k]).add_(1),
}  # fmt: skip


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_operands_that_an_operator_writes_or_gives_back(write: Callable[..., Any]) -> None:
    """The norms are of what they were before."""
    def f(x: Tensor, r: Tensor, h: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        h, k = h * 1.0, k * 1.0
        v, u = (t.pow(2).mean(-1, keepdim=True) for t in (h, k))
        write(x, h, k)
        return r + rms(h, v), r[0] + rms(k, u)

    torch.manual_seed(0)
    given = torch.randn(4, 8), torch.randn(4, 8), torch.randn(4, 8), torch.randn(8)
    torch._dynamo.reset()
    found = torch.compile(f, backend="normfuse", options={"inner": "eager"})
    torch.manual_seed(1)
    want = f(*given)
    torch.manual_seed(1)
    torch.testing.assert_close(found(*given), want)


def traced(module: nn.Module, *given: Tensor) -> fx.GraphModule:
    """With the modules of torch as they are called, and shapes."""
    graph = fx.symbolic_trace(module)
    scratch = copy.deepcopy(graph)
    ShapeProp(scratch).propagate(*given)
    for node, seen in zip(graph.graph.nodes, scratch.graph.nodes, strict=True):
        node.meta.update(seen.meta)
    return graph


class Averaged(nn.Module):
    """Running statistics as the weight, which their module then writes."""

    def __init__(self) -> None:
        super().__init__()
        self.bn: Any = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        h = x + x.sin()
        scaled = self.bn.running_var * rms(h)
        found: Tensor = self.bn(x) + scaled
        return found


class Table(nn.Module):
    """The norm of a table of which a lookup shortens the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(4, 8, max_norm=0.5)
        with torch.no_grad():
            self.e.weight.copy_(torch.randn(4, 8) * 3)

    def forward(self, x: Tensor) -> Tensor:
        v = self.e.weight.pow(2).mean(-1, keepdim=True)
        h: Tensor = self.e(x[:, 0].long() * 0)
        return rms(self.e.weight, v) + h


@pytest.mark.parametrize("kind", [Averaged, Table])
@pytest.mark.parametrize("training", [True, False])
def test_modules_that_write_what_they_hold(kind: type[nn.Module], training: bool) -> None:
    torch.manual_seed(0)
    module, x = kind().train(training), torch.randn(4, 8)
    want = copy.deepcopy(module)(x)
    torch.testing.assert_close(normfuse.optimize(traced(module, x), normfuse.Config(verify="off"))[0](x), want)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(lambda m, given, out: out * 2),
    "before": lambda m: m.register_forward_pre_hook(lambda m, given: (given[0].clamp(max=0.1),)),
    "backward": lambda m: m.register_full_backward_hook(lambda m, given, out: (torch.zeros(4, 8),)),
    "patched": lambda m: setattr(m, "forward", lambda x: x * 2), "none": lambda m: None,
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_of_a_norm(hook: str) -> None:
    """They would be lost with its call."""
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)), torch.randn(4, 8, requires_grad=True)
    HOOKS[hook](module[1])
    graph = traced(module, x)
    result, report = normfuse.optimize(graph, normfuse.Config(verify="off"))
    found, want = (torch.autograd.grad(f(x).sin().sum(), x)[0] for f in (result, graph))
    torch.testing.assert_close(found, want)
    assert [len(report.norms), *(r.code for r in report.refusals)] == ([1] if hook == "none" else [0, "NF116"])


def test_a_tensor_that_is_sorted_is_not_written() -> None:
    """TorchScript has a `sort` of lists, in place."""
    def f(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        h = x + r
        y = rms(h)
        return y, torch.sort(h)[0] + h.sort()[0]

    x, r = torch.randn(2, 8), torch.randn(2, 8)
    torch.testing.assert_close(compiled(f)(x, r), f(x, r))
    report = normfuse.last_report()
    assert report is not None and len(report.norms) == 1


@pytest.mark.parametrize(("hook", "norms"), [
    (lambda m: m.register_full_backward_hook(lambda *_: None), 1), (lambda m: nn.utils.spectral_norm(m).eval(), 1),
    (lambda m: m.register_forward_pre_hook(lambda m, given: (given[0].add_(1),)), 0),
])  # fmt: skip
def test_hooks_beside_a_norm(hook: Callable[[nn.Module], Any], norms: int) -> None:
    """Those of torch's utilities write the module's own weight, others may write what goes in."""
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l, self.o = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = x * 2
            v = h.pow(2).mean(-1, keepdim=True)
            beside = self.l(h)
            found: Tensor = beside + self.o(rms(h, v))
            return found

    torch.manual_seed(0)
    module, x = Beside().eval(), torch.randn(4, 8)
    hook(module.l)
    with torch.no_grad():
        graph = traced(module, x)
        result, report = normfuse.optimize(graph, normfuse.Config(verify="off"))
        torch.testing.assert_close(result(x), module(x))
    assert len(report.norms) == norms


def test_hooks_of_what_is_no_norm_are_no_refusal() -> None:
    module, x = nn.Sequential(nn.Conv1d(4, 8, 1), nn.GroupNorm(4, 8)), torch.randn(2, 4, 6)
    module[1].register_forward_hook(lambda *_: None)
    assert not normfuse.inspect(traced(module, x)).refusals


def test_reading_a_graph_of_many_modules_that_write_takes_linear_time() -> None:
    def seconds(n: int) -> float:
        class Many(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.b = nn.ModuleList(nn.BatchNorm1d(8) for _ in range(n))

            def forward(self, x: Tensor) -> Tensor:
                for b in self.b:
                    x = b(x) * b.weight
                return x

        graph = traced(Many(), torch.randn(4, 8))
        began = time.process_time()
        normfuse.inspect(graph)
        return time.process_time() - began

    seconds(10)
    assert seconds(400) < 20 * seconds(50) + 0.5


def test_a_graph_that_was_read_can_go() -> None:
    graph = traced(Averaged(), torch.randn(4, 8))
    normfuse.inspect(graph)
    normfuse.optimize(graph)
    left = weakref.ref(graph.graph)
    del graph
    gc.collect()
    assert left() is None


# -- gradients --------------------------------------------------------------------------------------------------------


def cut_in_place(x: Tensor, r: Tensor) -> Tensor:
    s = x + r
    return rms(s, s.pow(2).mean(-1, keepdim=True).detach_()) + s


def cut_beside(x: Tensor, r: Tensor) -> Tensor:
    s = x + r
    v = s.pow(2).mean(-1, keepdim=True)
    v.detach_()
    return rms(s, v) + s


def cut(x: Tensor, r: Tensor) -> Tensor:
    s = x + r
    return rms(s, s.pow(2).mean(-1, keepdim=True).detach()) + s


@pytest.mark.parametrize("f", [cut_in_place, cut_beside, cut])
def test_a_statistic_that_is_detached(f: Callable[[Tensor, Tensor], Tensor]) -> None:
    def gradient(f: Any) -> Tensor:
        torch.manual_seed(0)
        x = torch.randn(4, 8, requires_grad=True)
        (found,) = torch.autograd.grad(f(x, torch.randn(4, 8)).sin().sum(), x)
        return found

    torch.testing.assert_close(gradient(compiled(f)), gradient(f))


def carried(x: Tensor, state: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    s = x + state
    return w * rms(s), s


def test_a_sum_that_needs_no_gradient() -> None:
    """Only the weight is trained; the sum is carried from step to step."""
    def gradient(f: Any) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        w, state = torch.ones(8, requires_grad=True), torch.zeros(4, 8)
        for _ in range(3):
            y, state = f(torch.randn(4, 8), state, w)
            assert (y.requires_grad, state.requires_grad) == (True, False)
            y.sin().sum().backward()
        assert w.grad is not None
        return w.grad, state

    torch.testing.assert_close(gradient(compiled(carried)), gradient(carried))
    report = normfuse.last_report()
    assert report is not None and [n.emitted for n in report.norms] == ["normfuse.add_rms_norm"]


def test_of_two_results_only_one_needs_a_gradient() -> None:
    q, k, w = torch.randn(4, 8), torch.randn(4, 8), torch.ones(8, requires_grad=True)
    for found in (torch.ops.normfuse.qk_norm(q, k, w, None, None, None, EPS),
                  torch.ops.normfuse.norm_add_norm(q, k, None, None, w, None, EPS)):
        assert [t.requires_grad for t in found] == [True, False]
        found[0].sum().backward()


class Cut(nn.Module):
    """Values inside an exported program say that they need no gradient, whatever they are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.w = nn.Linear(8, 8), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.l(x) + x
        return self.w * rms(h, h.detach().pow(2).mean(-1, keepdim=True))


def test_a_statistic_of_an_exported_program_that_is_detached() -> None:
    torch.manual_seed(0)
    module, x = Cut(), torch.randn(4, 8)
    program = torch.export.export(module, (x,))
    result, _ = normfuse.optimize(program)

    def gradients(m: Any) -> tuple[Tensor, ...]:
        parameters = dict(m.named_parameters())
        return torch.autograd.grad(m(x).sin().sum(), [parameters["l.weight"], parameters["w"]])

    torch.testing.assert_close(gradients(result.module()), gradients(module))


def test_a_norm_of_a_new_tensor_that_is_detached() -> None:
    """torch.export writes constants so; there is nothing to cut."""
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + torch.tensor(EPS))

    (norm,) = normfuse.inspect(torch.export.export(Constant(), (torch.randn(4, 8),))).norms
    assert norm.eps == pytest.approx(EPS)


# -- types ------------------------------------------------------------------------------------------------------------


def test_bits_that_are_read_as_another_type() -> None:
    def f(x: Tensor, r: Tensor) -> Tensor:
        return r + rms(x.view(dtype=torch.bfloat16).float())

    torch.manual_seed(0)
    x, r = torch.randn(4, 8).half(), torch.randn(4, 8)
    torch.testing.assert_close(compiled(f)(x, r), f(x, r))


# -- functorch --------------------------------------------------------------------------------------------------------


def summed(x: Tensor) -> Tensor:
    s = x.sin() + x.cos()
    return s + rms(s)


TRANSFORMS: dict[str, Callable[[Tensor], Any]] = {
    "grad": lambda x: torch.func.grad(lambda x: summed(x).sin().sum())(x),
    "vjp": lambda x: torch.func.vjp(summed, x)[1](x.cos())[0],
    "jacrev": lambda x: torch.func.jacrev(summed)(x),
    "jvp": lambda x: torch.func.jvp(summed, (x,), (x.cos(),))[1],
    "vmap": lambda x: torch.func.vmap(summed)(x),
    "vmap of grad": lambda x: torch.func.vmap(torch.func.grad(lambda x: summed(x).sin().sum()))(x),
    "hessian": lambda x: torch.func.hessian(lambda x: summed(x).sin().sum())(x[:1]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_inside_of_what_is_compiled(name: str) -> None:
    torch.manual_seed(0)
    x, f = torch.randn(4, 8), TRANSFORMS[name]
    torch.testing.assert_close(compiled(f)(x), f(x))


@pytest.mark.parametrize("op", ["add_rms_norm", "norm_add", "norm_add_norm", "qk_norm"])
def test_transforms_of_the_operators(op: str) -> None:
    torch.manual_seed(0)
    x, r, w = torch.randn(4, 8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64), torch.ones(8).double()
    four = [w, None, w, None] if op in ("norm_add_norm", "qk_norm") else [w, None]

    def f(x: Tensor) -> Any:
        out = getattr(torch.ops.normfuse, op)(x, r, *four, EPS)
        return sum(o.sin().sum() for o in out) if isinstance(out, tuple) else out.sin().sum()

    jacobian: Any = torch.autograd.functional.jacobian
    want = jacobian(f, x)
    torch.testing.assert_close(torch.func.grad(f)(x), want)
    torch.testing.assert_close(torch.func.jvp(f, (x,), (r,))[1], (want * r).sum())
    torch.testing.assert_close(torch.func.jacfwd(f)(x), want)


class Straight(torch.autograd.Function):
    """An RMSNorm whose backward is not its derivative: twice that, by x, and none by the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return w * rms(x, x.pow(2).mean(-1, keepdim=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, w = ctx.saved_tensors
        with torch.enable_grad():
            y = w * rms(x := x.detach().requires_grad_(), x.pow(2).mean(-1, keepdim=True))
        return 2 * torch.autograd.grad(y, x, grads[0])[0], torch.zeros_like(w)


def test_a_backward_of_the_models_own_stays() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)

    def grads(f: Callable[..., Any]) -> list[Tensor]:
        return list(torch.autograd.grad(f(x, w).sin().sum(), (x, w)))

    want = grads(Straight.apply)
    torch.testing.assert_close(grads(compiled(Straight.apply, inner="aot_eager")), want)
    report = normfuse.last_report()
    assert report is not None and report.fused == 1
    assert not want[1].any() and want[0].any()
