"""The fusions by placement: each happens where it may, and not where one condition is broken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import normfuse
from normfuse.frontends import fx_model
from tests.fusing import N, ROWS, Arguments, fused, rms, tensors

# -- residual addition, then norm --------------------------------------------------------------------------------------


def test_add_norm_gives_both_results() -> None:
    def f(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        s = x + r
        return rms(s, w), s * 2

    assert fused(f, tensors(*ROWS[:3])) == {"add_rms_norm": 1}


def test_add_norm_through_a_view_of_the_rows() -> None:
    def f(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm((x + r).view(3, 4, N), (N,), w, b)

    assert fused(f, tensors((12, N), (12, N), (N,), (N,))) == {"add_layer_norm": 1}


def wide_norm(s: Tensor, w: Tensor) -> Tensor:
    """The norm of a sum in float32, in the type of the weight."""
    return (s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + 1e-6) * w.float()).to(w.dtype)


def round_sums(function: Callable[..., Any], args: Arguments) -> list[bool]:
    """`round_sum` of each add_norm that a function gets."""
    made, first = normfuse.optimize(make_fx(function)(*args))
    calls = [n for n in made.graph.nodes if "normfuse.add_" in str(n.target)]
    want, got = function(*args), made(*args)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype
    again, report = normfuse.optimize(made)
    assert [str(n.target) for n in again.graph.nodes] == [str(n.target) for n in made.graph.nodes]
    assert len(report.norms) == len(first.norms) and not report.fused
    return [len(n.args) < 9 or n.args[8] for n in calls]


def vllm_norm(s: Tensor, w: Tensor) -> Tensor:
    """The norm of a sum in float32, rounded to the type of the weight before that."""
    return (s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + 1e-6)).to(w.dtype) * w


@pytest.mark.parametrize("norm", [
    wide_norm, vllm_norm, lambda s, w: wide_norm(s, w.float()), lambda s, w: vllm_norm(s, w).float(),
    lambda s, w: wide_norm(s - s.mean(-1, keepdim=True), w),
    lambda s, w: vllm_norm(s - s.mean(-1, keepdim=True), w) + w,
])  # fmt: skip
@pytest.mark.parametrize("wide", [Tensor.float, lambda r: r])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_of_the_sum_before_it_is_rounded(dtype: torch.dtype, wide: Callable[[Tensor], Tensor],
                                                norm: Callable[[Tensor, Tensor], Tensor]) -> None:  # fmt: skip
    def f(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        s = x.float() + wide(r)
        return norm(s, w), s.to(x.dtype)

    args = tensors((64, N), (64, N), (N,), dtype=dtype)
    assert round_sums(f, args) == [False]
    x, r, w = args
    hostile = (torch.zeros_like(x), x * 2000, x * 1e-4, torch.full_like(x, 3e4), -r + 2**-7 * x)
    for a in hostile:  # sums that cancel, that overflow float16 when they are rounded, subnormal ones
        assert round_sums(f, (a, r, w)) == [False]
    assert round_sums(f, (hostile[3], hostile[3].clone(), w)) == [False]


@pytest.mark.parametrize("others", [
    lambda s, x, r: (s,),  # it stays in float32
    lambda s, x, r: (s.to(x.dtype), s * 2),  # it is read by somebody else
    lambda s, x, r: (s.to(x.dtype), s.half()),  # rounded twice
    lambda s, x, r: (s.half(),),  # rounded to another type
    lambda s, x, r: ((x.float() + 2 * r.float()).to(x.dtype),),  # what is rounded is another sum
    lambda s, x, r: (s.mul_(1).to(x.dtype),),  # written in place
])  # fmt: skip
def test_a_sum_in_float32_that_is_kept(others: Callable[..., tuple[Tensor, ...]]) -> None:
    def f(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        s = x.float() + r.float()
        return wide_norm(s, w), *others(s, x, r)

    assert False not in round_sums(f, tensors((64, N), (64, N), (N,), dtype=torch.bfloat16))


def test_a_sum_with_a_summand_of_another_type() -> None:
    def f(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        s = x.float() + r.float()
        return wide_norm(s, w), s.to(x.dtype)

    x, r, w = tensors((64, N), (64, N), (N,), dtype=torch.bfloat16)
    assert False not in round_sums(f, (x, r.half(), w))
    assert False not in round_sums(f, (x, r.float(), w))


def test_one_of_two_norms_of_a_sum_takes_it_in() -> None:
    def f(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        s = x + r
        return F.layer_norm(s, (N,), w), F.layer_norm(s, (N,), v)

    assert fused(f, tensors(*ROWS)) == {"add_layer_norm": 1}


@pytest.mark.parametrize(("function", "shapes"), [
    pytest.param(lambda x, r, w: F.layer_norm(x + r, (N,), w), ((3, 4, N), (1, 1, N), (N,)), id="broadcast"),
    pytest.param(lambda x, r, w: F.layer_norm(x + r, (N,), w), ((3, 4, N), (4, N), (N,)), id="other rank"),
    pytest.param(lambda x, r, w: F.layer_norm(torch.add(x, r, alpha=2), (N,), w), ROWS[:3], id="alpha"),
    pytest.param(lambda x, r, w: F.layer_norm(x - r, (N,), w), ROWS[:3], id="difference"),
    pytest.param(lambda x, r, w: F.layer_norm((x + r).add_(1), (N,), w), ROWS[:3], id="written in place"),
    pytest.param(lambda x, r, w: F.layer_norm((x + r).view(3, 2, 2 * N), (2 * N,), w), ((3, 4, N), (3, 4, N), (2 * N,)),
                 id="view across rows"),
    pytest.param(lambda x, r, w: F.layer_norm((x + r).transpose(0, 1), (N,), w), ROWS[:3], id="transposed"),
    pytest.param(lambda x, r, w: rms((x + r).transpose(1, 2), w).transpose(1, 2), ((3, N, 4), (3, N, 4), (N,)),
                 id="inner axis"),
    pytest.param(lambda x, r, w: F.layer_norm(x + r, (4, N), w), ((3, 4, N), (3, 4, N), (4, N)), id="two axes"),
])  # fmt: skip
def test_add_norm_is_refused(function: Callable[..., Any], shapes: tuple[tuple[int, ...], ...]) -> None:
    assert not fused(function, tensors(*shapes)).keys() & {"add_rms_norm", "add_layer_norm"}


@pytest.mark.parametrize("weight", [(4, 1), (4, N), (1,)])
def test_a_weight_that_is_no_row_stays_outside(weight: tuple[int, ...]) -> None:
    assert fused(lambda x, r, w: rms(x + r, w), tensors((3, 4, N), (3, 4, N), weight)) == {"add_rms_norm": 1}


# -- norm, then residual addition, and the sandwich --------------------------------------------------------------------


def post(f: Tensor, r: Tensor, w: Tensor, up: Tensor) -> Tensor:
    """OLMo 2's place: the norm of a branch, inside the residual."""
    return r + rms(F.linear(f, up), w)


def test_norm_add() -> None:
    assert fused(post, tensors((3, 4, N), (3, 4, N), (N,), (N, N))) == {"norm_add": 1}


def test_norm_add_with_a_bias_that_is_taken_away() -> None:
    """Behind the cast back, it stays in the type that the model has it in."""
    def f(x: Tensor, r: Tensor, b: Tensor) -> Tensor:
        return r + (rms(x, None) - b)

    assert fused(f, tensors(*ROWS[:3], dtype=torch.float16), exact=True)["norm_add"] == 1


@pytest.mark.parametrize(("function", "shapes"), [
    pytest.param(lambda f, r, w: (n := rms(f, w)) * n + (r + n), ROWS[:3], id="norm read twice"),
    pytest.param(lambda f, r, w: r - rms(f, w), ROWS[:3], id="difference"),
    pytest.param(lambda f, r, w: r + rms(f, w), ((3, 4, N), (N,), (N,)), id="broadcast"),
    pytest.param(lambda f, r, w: (lambda s: (s.view(-1), s.mul_(2)))(r + rms(f, w)), ROWS[:3], id="sum written"),
])  # fmt: skip
def test_norm_add_is_refused(function: Callable[..., Any], shapes: tuple[tuple[int, ...], ...]) -> None:
    assert "norm_add" not in fused(function, tensors(*shapes))


def sandwich(f: Tensor, r: Tensor, w: Tensor, v: Tensor, up: Tensor, *, eps: float = 1e-6, twice: bool = False,
             ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gemma's place: a branch is normed before it is added and again before the next branch."""
    n = rms(F.linear(rms(r, v) * f, up), w)
    s = r + n
    y = rms(s, v, eps)
    s = s + rms(F.linear(torch.relu(F.linear(y, up)), up), w)
    return F.linear(y, up), rms(s, v) * n if twice else s


SANDWICH = ((3, 4, N), (3, 4, N), (N,), (N,), (N, N))


def test_sandwich() -> None:
    made = fused(sandwich, tensors(*SANDWICH))
    assert made == {"norm_add_norm": 1, "norm_add": 1}


def test_sandwich_is_refused() -> None:
    made = fused(lambda *a: sandwich(*a, eps=1e-5), tensors(*SANDWICH))
    assert made == {"norm_add": 2}
    made = fused(lambda *a: sandwich(*a, twice=True), tensors(*SANDWICH))
    assert made["add_rms_norm"] == 1


# -- autocast and branches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_an_operator_of_ours_takes_the_place(dtype: torch.dtype) -> None:
    def f(x: Tensor, w: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = F.linear(x, up)
            return rms(x, w), rms(y, w)

    assert fused(f, tensors((4, N), (N,), (N, N), dtype=dtype), exact=True) == {"rms_norm": 2}


@pytest.mark.parametrize(("kind", "on"), [("region", True), ("branches", True), ("off", False), ("off inside", False)])
def test_in_sub_graphs_under_autocast_too(kind: str, on: bool) -> None:
    """An exported program has a sub-graph for that, where torch's own norms give float32 on CUDA."""
    class Under(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Any:
            if kind == "off":
                with torch.autocast("cpu", torch.bfloat16, enabled=False):
                    return rms(x, w).relu()
            with torch.autocast("cpu", torch.bfloat16):
                if kind == "off inside":
                    with torch.autocast("cpu", enabled=False):
                        y = rms(x, w).relu()
                    return y + 1
                if kind == "branches":
                    return torch.cond(x.sum() > 0, lambda x: rms(x, w).relu(), lambda x: rms(x, w).sin(), (x,))
                return rms(x, w).relu()

    args = tensors((4, N), (N,))
    made, report = normfuse.optimize(torch.export.export(Under(), tuple(args)))
    assert {n.emitted for n in report.norms} == {"normfuse.rms_norm" if on else "rms_norm"}
    torch.testing.assert_close(made.module()(*args), Under()(*args))


def test_branches_inside_of_branches() -> None:
    class Nested(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Any:
            def inner(x: Tensor) -> Any:
                return torch.cond(x.sum() > 1, lambda x: rms(x, w).sin(), lambda x: rms(x, w).tanh(), (x,))

            return torch.cond(x.sum() > 0, inner, lambda x: rms(x, w).cos(), (x,))

    args = tensors((4, N), (N,))
    made, report = normfuse.optimize(torch.export.export(Nested(), tuple(args)))
    assert [(n.action, n.verified) for n in report.norms] == [("fused", True)] * 3
    assert report.operators_after["rms_norm"] == 3 and not report.operators_after.get("rsqrt")
    for x in (args[0], -args[0]):
        torch.testing.assert_close(made.module()(x, args[1]), Nested()(x, args[1]))


# -- a slice -----------------------------------------------------------------------------------------------------------


def test_latent_is_read_where_it_lies() -> None:
    def f(x: Tensor, down: Tensor, w: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        c, k = torch.split(F.linear(x, down), [N, 8], dim=-1)
        return F.linear(rms(c, w), up), k

    assert fused(f, tensors((3, 4, N), (N + 8, N), (N,), (N, N))) == {"rms_norm": 1}


# -- the order of roundings --------------------------------------------------------------------------------------------


def llama(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * h.to(x.dtype)


def gemma(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (h * (1.0 + w.float())).type_as(x)


def t5(x: Tensor, w: Tensor) -> Tensor:
    h = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * h.to(w.dtype)


def cohere(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    h = h - h.mean(-1, keepdim=True)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (w.float() * h).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [llama, gemma, rms, t5, cohere])
def test_roundings_are_kept_bit_for_bit(norm: Callable[..., Tensor], dtype: torch.dtype) -> None:
    def f(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        s = x + r
        return norm(s, w), s

    made = fused(f, tensors((32, 64), (32, 64), (64,), dtype=dtype), exact=True)
    assert sum(made.values()) == 1 and next(iter(made)).startswith("add_")


def test_a_float32_weight_on_half_rows_gives_float32() -> None:
    def f(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        s = x + r
        return llama(s, w), s

    args = (*tensors((32, 64), (32, 64), dtype=torch.bfloat16), *tensors((64,)))
    assert fused(f, args, exact=True) == {"add_rms_norm": 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True])
def test_a_weight_and_a_number_are_added_in_half_precision_or_not(wide: bool, dtype: torch.dtype) -> None:
    """As litgpt and transformers have Gemma's: 1 + w is rounded, or not."""
    w = torch.randn(64).mul(0.2).to(dtype)

    def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return (y * (1 + w.float() if wide else (1 + w).float())).to(x.dtype)

    x = torch.randn(512, 64).to(dtype)
    torch._dynamo.reset()
    got = torch.compile(norm, backend="normfuse", options={"inner": "eager"})(x, w)
    report = normfuse.last_report()
    assert report is not None
    assert [n.action for n in report.norms] == ["fused"], report.refusals
    assert (got != norm(x, w)).float().mean() < 0.01


def test_a_norm_in_half_precision_throughout_is_left_unless_fast() -> None:
    def f(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        s = x + r
        return w * (s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + 1e-6)), s

    args = tensors((32, 64), (32, 64), (64,), dtype=torch.bfloat16)
    assert not fused(f, args, exact=True)


# -- a graph that is read again ----------------------------------------------------------------------------------------


def tripled(x: Tensor, w: Tensor) -> tuple[Tensor]:
    """Computed in a half type and widened: a factor behind that is the norm's own once it has an operator."""
    n = x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 0.01)
    return (torch.tanh((n + n).float() * 3),)


@pytest.mark.parametrize(("function", "dtype", "numerics", "rounds", "emitted"), [
    (tripled, torch.float16, "fast", 3, ["_fused_rms_norm, _to_copy, mul"]),
    (tripled, torch.float16, "exact", 1, [""]),
    (lambda x, w: (rms(x, w),), torch.float32, "exact", 1, ["_fused_rms_norm"]),
])  # fmt: skip
def test_what_a_change_shows_is_done_too(function: Callable[..., Any], dtype: torch.dtype, numerics: Any, rounds: int,
                                         emitted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A graph is read again where that may show more, and the report tells what was done in all."""
    read: list[object] = []

    class Counted(fx_model._Module):
        def __init__(self, source: Any, *args: Any) -> None:
            read.append(source)
            super().__init__(source, *args)

    monkeypatch.setattr(fx_model, "_Module", Counted)
    config = normfuse.Config(numerics=numerics)
    args = tensors((3, 4, N), (N,), dtype=dtype)
    made, report = normfuse.optimize(make_fx(function)(*args), config)
    assert [norm.emitted for norm in report.norms] == emitted and len(read) == rounds
    assert all(norm.action == ("fused" if norm.emitted else "refused") for norm in report.norms)
    assert [r.code for r in report.refusals] == ["NF202"] * emitted.count("")
    again, after = normfuse.optimize(made, config)
    assert str(again.graph) == str(made.graph) and not after.fused
    assert report.nodes_after == after.nodes_before == len([n for n in made.graph.nodes if n.op == "call_function"]) - (
        str(made.graph).count("operator.getitem"))
    for exact, own, new in zip(function(*(a.double() for a in args)), function(*args), made(*args), strict=True):
        ulp = torch.finfo(dtype).eps * exact.abs().max()
        assert (new - exact).abs().max() <= (own - exact).abs().max() + ulp and new.dtype == own.dtype


def test_an_operator_whose_results_nobody_reads_goes() -> None:
    """A trace takes all results of an operator; here its statistics are read by nobody."""
    def f(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        s = x.float() + r.float()
        return F.layer_norm(s, (N,), w.float()).to(w.dtype), s.to(x.dtype)

    args = tensors((64, N), (64, N), (N,), dtype=torch.bfloat16)
    assert round_sums(f, args) == [True]
    made, _ = normfuse.optimize(make_fx(f)(*args))
    assert not [n for n in made.graph.nodes if "native_layer_norm" in str(n.target)]


def test_a_norm_that_nobody_reads_has_a_name() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        F.layer_norm(x, (N,), w)
        return x + 1

    _, report = normfuse.optimize(make_fx(f)(*tensors((64, N), (N,))))
    assert [n.name for n in report.norms] == ["native_layer_norm"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_operator_of_the_unrounded_sum_reads_as_it_computes(dtype: torch.dtype) -> None:
    def f(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = torch.ops.normfuse.add_rms_norm(x, r, w, None, 1e-6, 0.0, "last", None, False)
        return out

    (norm,) = normfuse.inspect(make_fx(f)(*tensors((64, N), (64, N), (N,), dtype=dtype))).norms
    assert norm.dtype == ("float64" if dtype == torch.float64 else "float32") and norm.form == "op"
