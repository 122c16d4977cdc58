"""The kernels against `normfuse.ops.meaning`, on a GPU or, where there is none, in Triton's interpreter.

TRITON_INTERPRET=1 python -m tests.kernel_cases

prints what each case found, as JSON. The interpreter has to be chosen before Triton is imported, so that the tests run
this module in a process of its own, and nothing here imports the kernels before a case runs.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any

import torch
from torch import Tensor

from normfuse.ops import meaning
from tests.kernel_tools import (BF16, CASES, CLASSES, EPS, FP16, FP32, FP64, KINDS, RARE, Found, apart,
                                assert_bits, assert_close, assert_rounded, case, compare, draw, grid, kernels,
                                neighbour, same_form, some, tensors, views)  # fmt: skip


# -- forward -----------------------------------------------------------------------------------------------------------


@case
def forward(device: str) -> Found:
    """Every operator, size and type."""
    different = elements = 0
    for n, dtype, kind, cast, offset in grid():
        m = 5 if n < 4096 else 2
        x, r, k = (draw(*s, n, dtype=dtype, seed=i, device=device) for i, s in enumerate(((m,), (m,), (1, 3))))
        w, b, w2 = (draw(n, dtype=dtype, seed=i, device=device) for i in range(3, 6))
        how = (EPS, offset, cast, None)
        different += compare("norm", x, w, b, *how, kind) + compare("norm", k, None, None, *how, kind)
        for round_sum in (True, False):
            different += compare("add_norm", x, r, w, None, *how, round_sum, kind)
        different += compare("norm_add", x, r, w, b, *how, kind)
        if n <= 4096:  # longer ones are made of the above
            different += compare("norm_add_norm", x, r, w, b, w2, None, *how, kind)
            different += compare("qk_norm", x, k, w, b, w2, None, *how, kind)
        elements += 6 * x.numel() + k.numel()
    return {"different": different, "elements": elements}


@case
def spelling_classes(device: str) -> Found:
    """A million elements of each order of roundings in both half types, in the interpreter a quarter of it."""
    found: Found = {}
    elements = 2**18 if device == "cpu" else 2**20
    for name, (n, kind, cast, offset) in CLASSES.items():
        for dtype in (BF16, FP16):
            x, w = draw(elements // n, n, dtype=dtype, device=device), draw(n, dtype=dtype, device=device)
            how = (EPS, offset, cast, None, kind)
            got, want = (m.norm(x, w, None, *how) for m in (kernels(), meaning))
            same_form(got, want)
            if cast == "first":  # the weight multiplies a rounded n: that is what may be an ulp away, and nothing else
                n0 = meaning.norm(x, None, None, *how)
                bare = kernels().norm(x, None, None, *how)
                assert int(apart(bare, n0).max()) <= 1, (name, dtype)
                products = torch.stack([neighbour(n0, k) * w for k in (-1, 0, 1)])
                assert bool((got == products).any(0).all()), (name, dtype)
            else:
                assert int(apart(got, want).max()) <= 1, (name, dtype)
            different = int((apart(got, want) > 0).sum())
            assert different <= RARE * x.numel(), (name, dtype, different)
            found[f"{name} {str(dtype)[6:]}"] = f"{different} of {x.numel()}"
    return found


@case
def mixed_types(device: str) -> Found:
    """Parameters and residuals of other types than x, and a type that is asked for."""
    n, different = 200, 0
    half, single = ({d: draw(6, n, dtype=d, seed=s, device=device) for d in (BF16, FP16, FP32)} for s in (0, 1))
    for x, w in some(((x, s[0]) for x in half.values() for s in single.values()), 2):
        for cast in ("first", "last"):
            for dtype in (None, FP32, BF16):
                for offset, b in ((1.0, None), (0.0, single[FP32][1])):
                    different += compare("norm", x, w, b, EPS, offset, cast, dtype)
            for r in single.values():
                for round_sum in (True, False):
                    different += compare("add_norm", x, r, w, None, EPS, 0.0, cast, None, round_sum)
                different += compare("norm_add", x, r, w, None, EPS, 0.0, cast)
                different += compare("norm_add_norm", x, r, w, None, w, w, EPS, 0.0, cast)
    y = kernels().norm(half[BF16], single[FP32][0], None, EPS, 0.0, "first")
    assert y.dtype == FP32
    return {"different": different}


@case
def shortest_and_longest_rows(device: str) -> Found:
    """N = 1 and N = 262,144, forward and backward."""
    for n in (1, 262_144):
        x, r, w = (draw(*shape, seed=s, device=device) for s, shape in enumerate(((1, n), (1, n), (n,))))
        compare("add_norm", x, r, w, w, EPS, 0.0, "last", None, True, "layer_norm")
        if n == 1 or "NORMFUSE_SAMPLE" not in os.environ:  # 20 s in the interpreter
            compare("norm_backward", r, x, w, w, None, EPS, 0.0, "layer_norm", True, True)
    return {}


@case
def left_to_the_definition(device: str) -> Found:
    """float64 beside a narrower x, rows that are too long, and nothing at all."""
    long = draw(1, 262_145, device=device)
    assert_bits(kernels().norm(long, None, None, EPS), meaning.norm(long, None, None, EPS))
    x, w = draw(4, 6, device=device), draw(6, dtype=FP64, device=device)
    assert_bits(kernels().norm(x, w, None, EPS, 0.0, "first"), meaning.norm(x, w, None, EPS, 0.0, "first"))
    for shape in ((0, 8), (2, 0, 3, 8)):
        x = draw(*shape, device=device)
        w = draw(8, device=device)
        for name, args in (("norm", (x, w, None, EPS)), ("add_norm", (x, x, w, None, EPS)),
                           ("norm_add", (x, x, w, None, EPS)), ("norm_add_norm", (x, x, w, None, w, None, EPS)),
                           ("qk_norm", (x, draw(3, 8, device=device), w, None, w, None, EPS)),
                           ("norm_backward", (x, x, w, w, None, EPS, 0.0, "rms_norm", True, True))):  # fmt: skip
            for g, e in zip(tensors(getattr(kernels(), name)(*args)), tensors(getattr(meaning, name)(*args)),
                            strict=True):  # fmt: skip
                assert_close(g, e, e.double(), name)
    return {}


@case
def hostile_values(device: str) -> Found:
    """Large means, tiny variances, the end of float16's range, zeros, infinities and NaN in a row beside others."""
    for n in (96, 1024, 40000):
        base = draw(4, n, device=device)
        for mean, spread in ((100.0, 1.0), (1000.0, 1.0), (-1000.0, 1e-2), (1.0, 1e-3), (0.0, 1e-9)):
            compare("norm", base * spread + mean, None, None, EPS, 0.0, "last", None, "layer_norm")
        big = (draw(4, n, seed=1, device=device) * 2e4).clamp(-6e4, 6e4).half()
        for kind in KINDS:
            compare("norm", big, None, None, EPS, 0.0, "first", None, kind)
            bad = base.clone()
            bad[0, 1], bad[1, 0], bad[2] = float("inf"), float("nan"), 0.0
            got, want = (m.norm(bad, None, None, EPS, 0.0, "last", None, kind) for m in (kernels(), meaning))
            assert_close(got[2:], want[2:], want[2:].double())
            assert bool((got[0] == 0).sum() + got[0].isnan().sum() == n) and bool(got[1].isnan().all())
    return {}


@case
def many_rows_and_half_numbers(device: str) -> Found:
    """Every bfloat16 number, subnormal, NaN and infinite ones too, is read, added to and rounded as torch does it."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=device).view(BF16)[:, None]
    for r in (torch.zeros_like(x), x.flip(0)):
        _, s = kernels().add_norm(x, r, None, None, EPS)
        assert_bits(s, x + r)
    return {"rows": x.shape[0]}


# -- rows that lie elsewhere -------------------------------------------------------------------------------------------


@case
def strided(device: str) -> Found:
    """Views give what their contiguous copies give, and results that lie as `torch.empty_like` lies.

    In the interpreter bit for bit; a GPU loads rows of another alignment in other vectors, and sums in another order.
    """
    same = assert_bits if device == "cpu" else assert_rounded
    launch, where = kernels(), (EPS, 0.0, "rms_norm")
    types = ((64, BF16), (100, FP32), (3, FP16))
    for n, dtype, name, x in some(((*t, *view) for t in types for view in views(*t, device)), 5):
        w = draw(n, dtype=dtype, device=device)
        r, flat = draw(*x.shape, dtype=dtype, seed=9, device=device), x.contiguous()
        pairs = [(launch.norm(x, w, None, EPS), launch.norm(flat, w, None, EPS)),
                 *zip(launch.add_norm(x, r, w, None, EPS), launch.add_norm(flat, r, w, None, EPS), strict=True),
                 (launch.norm_add(r, x, w, None, EPS), launch.norm_add(r, flat, w, None, EPS)),
                 *zip(launch.qk_norm(r, x, w, None, w, None, EPS),
                      launch.qk_norm(r, flat, w, None, w, None, EPS), strict=True),
                 *zip(launch.norm_add_norm(x, r, w, None, w, None, EPS),
                      launch.norm_add_norm(flat, r, w, None, w, None, EPS), strict=True),
                 *((launch.norm_backward(a, b, w, None, c, *where, True, False)[0],
                    launch.norm_backward(*(t.contiguous() for t in (a, b)), w, None, c.contiguous(), *where, True,
                                         False)[0]) for a, b, c in ((x, r, r), (r, x, r), (r, r, x)))]  # fmt: skip
        for i, (got, want) in enumerate(pairs):
            same(got, want, name, n, i)
        y = pairs[0][0]
        if name not in ("last axis not dense", "four axes"):
            assert y.stride() == torch.empty_like(x).stride(), (name, y.stride())
        for got, want in zip(launch.norm_backward(r, x, w, w, r, *where, True, True),
                             meaning.norm_backward(r, flat, w, w, r, *where, True, True), strict=True):  # fmt: skip
            assert_close(got, want, want.double(), name, n)
    return {}


# -- gradients ---------------------------------------------------------------------------------------------------------


def autograd(name: str, inputs: list[Tensor | None], outs: list[Tensor], *how: Any) -> list[Tensor | None]:
    """The gradients of an operator's definition in float64, given those of its results."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    results = tensors(getattr(meaning, name)(*leaves, *how))
    wanted = [t for t in leaves if t is not None]
    with torch.enable_grad():
        found = iter(torch.autograd.grad(results, wanted, [o.double() for o in outs]))
    return [None if t is None else next(found) for t in leaves]


def noise(x: Tensor, dy: Tensor, w: Tensor, offset: float, kind: str) -> Tensor:
    """The size of what cancels in each row of dx: rstd * |dy * (offset + weight)|."""
    h = x.double()
    h = h - h.mean(-1, keepdim=True) if kind == "layer_norm" else h
    g = dy.double() * (w.double() + offset)
    return (h.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * g.abs().amax(-1, keepdim=True)


def assert_gradients(got: tuple[Tensor, ...], exact: list[Tensor | None], noises: list[Tensor],
                     *about: object) -> float:  # fmt: skip
    """Each within its rounding and some eps of C; the worst error in units of what is allowed."""
    worst = 0.0
    for i, (g, e) in enumerate(zip(got, exact, strict=True)):
        if e is not None and g.numel():
            size = e.abs().max() + (noises[i] if i < len(noises) else 0.0)
            c = torch.finfo(meaning.compute_type(g.dtype)).eps
            allowed = 0.51 * torch.finfo(g.dtype).eps * e.abs() + 16 * c * size
            share = float(((g.double() - e).abs() / allowed.clamp_min(1e-300)).max())
            worst = max(worst, share)
            assert share <= 1, (*about, i, share)
    return worst


@case
def backward(device: str) -> Found:
    """Every operator, size and type, against float64 autograd of the definition."""
    launch, worst = kernels(), 0.0
    for n, dtype, kind, _, offset in grid():
        x, s, dy, ds = (draw(5 if n < 4096 else 2, n, dtype=dtype, seed=i, device=device) for i in range(4))
        k, dk = (draw(1, 3, n, dtype=dtype, seed=i, device=device) for i in (4, 5))
        w, b, w2, b2 = (draw(n, dtype=dtype, seed=i, device=device) for i in (6, 7, 8, 9))
        how, at, about = (EPS, offset, "last", None), (EPS, offset, kind), (n, dtype, kind, offset)
        exact = autograd("norm", [x, w, b], [dy], *how, kind)
        exact_ds = None if exact[0] is None else exact[0] + ds.double()
        loud = [noise(x, dy, w, offset, kind)]
        got = launch.norm_backward(dy, x, w, b, None, *at, True, True)
        worst = max(worst, assert_gradients(got, exact, loud, *about))
        got = launch.norm_backward(dy, x, w, b, ds, *at, True, False)
        worst = max(worst, assert_gradients(got, [exact_ds, exact[1], None], loud, *about))
        assert got[2].numel() == 0
        if n > 4096:
            continue  # what follows is made of the above
        two = autograd("qk_norm", [x, k, w, b, w2, None], [dy, dk], *how, kind)
        got = launch.qk_norm_backward(dy, dk, x, k, w, b, w2, None, *at, [True] * 4)
        worst = max(worst, assert_gradients(got, two, [*loud, noise(k, dk, w2, offset, kind)], *about))
        assert_sandwich(about, (dy, ds, x, s, w, b, w2, b2), *at)
    return {"worst share of what is allowed": round(worst, 3)}


def assert_sandwich(about: object, args: tuple[Any, ...], *at: Any) -> None:
    """The fused backward of a sandwich has the bits of dx and dr that two backwards have."""
    dy, ds, x, s, w, b, w2, b2 = args
    launch = kernels()
    got = launch.norm_add_norm_backward(*args, *at, [True] * 4)
    dr, dw2, db2 = launch.norm_backward(dy, s, w2, b2, ds, *at, True, True)
    dx, dw, db = launch.norm_backward(dr, x, w, b, None, *at, True, True)
    for i, (g, e) in enumerate(zip(got, (dx, dr, dw, db, dw2, db2), strict=True)):
        assert_close(g, e, e.double(), about, i)


@case
def mixed_backward(device: str) -> Found:
    """A gradient and parameters wider than x; a q and a k that differ in everything."""
    launch, worst = kernels(), 0.0
    x, dy = draw(6, 96, dtype=BF16, device=device), draw(6, 96, seed=1, device=device)
    w, b = draw(96, seed=2, device=device), draw(96, dtype=FP16, seed=3, device=device)
    k, dk = draw(2, 9, 40, dtype=FP16, device=device), draw(2, 9, 40, dtype=FP16, seed=1, device=device)
    wk = draw(40, dtype=FP16, seed=2, device=device)
    for kind in KINDS:
        how, at = (EPS, 1.0, "last", None, kind), (EPS, 1.0, kind)
        loud = [noise(x, dy, w, 1.0, kind), noise(k, dk, wk, 1.0, kind)]
        got = launch.norm_backward(dy, x, w, b, None, *at, True, True)
        worst = max(worst, assert_gradients(got, autograd("norm", [x, w, b], [dy], *how), loud, kind))
        pair = autograd("qk_norm", [x, k, w, b, wk, None], [dy, dk], *how)
        got = launch.qk_norm_backward(dy, dk, x, k, w, b, wk, None, *at, [True] * 4)
        worst = max(worst, assert_gradients(got, pair, loud, kind))
        compare("qk_norm", x, k, w, b, wk, None, *how)
        bare = launch.norm_backward(dy, x, None, None, dy, *at, True, True)
        for g, e in zip(bare, meaning.norm_backward(dy, x, None, None, dy, *at, True, True), strict=True):
            assert_close(g, e, e.double(), kind)
    return {"worst share of what is allowed": round(worst, 3)}


@case
def many_rows_backward(device: str) -> Found:
    """More rows than programs: weights' gradients over several tiles, the same bits on every run."""
    launch = kernels()
    launch.TUNED[(64, 2, 4)] = launch.Config(8, 64, 4, 5)
    x, dy = (draw(300, 64, dtype=BF16, seed=i, device=device) for i in (0, 1))
    w = draw(64, dtype=BF16, device=device)
    try:
        launch._plan_backward.cache_clear()
        first, again = (launch.norm_backward(dy, x, w, w, None, EPS, 0.0, "layer_norm", True, True) for _ in range(2))
    finally:
        launch.TUNED.clear()
        launch._plan_backward.cache_clear()
    for a, b in zip(first, again, strict=True):
        assert_bits(a, b)
    exact = autograd("norm", [x, w, w], [dy], EPS, 0.0, "last", None, "layer_norm")
    share = assert_gradients(first, exact, [noise(x, dy, w, 0.0, "layer_norm")])
    return {"worst share of what is allowed": round(share, 3)}


@case
def rows_do_not_know_their_batch(device: str) -> Found:
    """A row alone and among 37 has the same bits, forward and backward; and so has a second run.

    In the interpreter, which is slow, among 11.
    """
    launch, last = kernels(), 10 if device == "cpu" else 36
    for n, kind in ((7, KINDS[1]), (128, KINDS[0]), (2048, KINDS[1])):
        x, r, dy = (draw(last + 1, n, dtype=BF16, seed=i, device=device) for i in range(3))
        w = draw(n, dtype=BF16, device=device)

        def run(rows: slice, x: Tensor = x, r: Tensor = r, dy: Tensor = dy, w: Tensor = w,
                kind: str = kind) -> list[Tensor]:  # fmt: skip
            x, r, dy = x[rows], r[rows], dy[rows]
            how = (EPS, 0.0, "first", None)
            return [launch.norm(x, w, None, *how, kind), *launch.add_norm(x, r, w, None, *how, True, kind),
                    *launch.norm_add_norm(x, r, w, None, w, None, *how, kind),
                    launch.norm_backward(dy, x, w, w, r, EPS, 0.0, kind, True, True)[0],
                    *launch.norm_add_norm_backward(dy, dy, x, r, w, None, w, None, EPS, 0.0, kind,
                                                   [True] * 4)[:2]]  # fmt: skip

        batch, again = run(slice(None)), run(slice(None))
        for a, b in zip(batch, again, strict=True):
            assert_bits(a, b)
        for i in (0, last // 2, last):
            for a, b in zip(run(slice(i, i + 1)), batch, strict=True):
                assert_bits(a, b[i : i + 1], n, kind, i)
    return {}


def run_all(device: str, names: list[str]) -> dict[str, Found]:
    """What each case found, or how it failed."""
    out = {}
    for name in names or CASES:
        started = time.perf_counter()
        try:
            found = CASES[name](device)
        except Exception:
            found = {"failed": traceback.format_exc()}
        out[name] = found | {"seconds": round(time.perf_counter() - started, 1)}
    return out


def loops_with_new_numpy() -> None:
    """Triton 3.6 takes int(array of one element) in a loop's bounds, which NumPy has ceased to do."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched


if __name__ == "__main__":
    loops_with_new_numpy()
    print(json.dumps(run_all("cpu", sys.argv[1:])))
