"""Norms of what was written in place before, and is not afterwards; random programs that write in place."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import normfuse
from tests.compiling import compiled, last
from tests.in_place import EPS, N, Program, calls, exported, given, through


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
