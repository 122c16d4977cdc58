"""Milliseconds and GB/s of the operators, forward and backward, beside what else computes the same on a CUDA GPU.

python -m tests.bench.kernels [--quick] [--tune] [--kinds rms_norm ...] [--types bf16 ...] [--widths 4096 ...]
    [--rows 4096 ...] [--out FILE.json]

GB/s counts each tensor that has to be read or written once. `share` is in parts of what a copy of as many bytes reaches
in the same run. Inputs rotate through more memory than the L2 cache holds; times are of CUDA graphs, so that they are
the GPU's and not Python's. A backward gives every gradient, that of the residual and of the weights too. Query and key
are heads of one projection: rows with strides. --tune times other tiles than `launch.config` gives and prints the best
as `launch.TUNED`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tests.bench.common import ROOT, save, table

RESULT = ROOT / "tests/bench/results/kernels.json"
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS, QUICK_ROWS = (1, 16, 256, 4096, 65536), (16, 4096)
WIDTHS, QUICK_WIDTHS = (64, 128, 1024, 4096, 8192, 16384, 65536), (128, 4096)
MOST = 2**31  # elements
EPS = 1e-6
FLUSH = 256 * 2**20
"""Bytes that a timed round touches at least: more than any L2 cache."""
KINDS = {"rms_norm": (2, 3), "layer_norm": (2, 3), "add_rms_norm": (4, 4), "add_layer_norm": (4, 4),
         "norm_add": (3, 3), "norm_add_norm": (4, 6), "qk_norm": (2, 3)}  # fmt: skip
"""The tensors of x's size that forward and backward move at the least; the residual's gradient is one with another."""
HEADS, KV_HEADS, WIDEST_HEAD = 8, 2, 256

Run = Callable[..., Any]


# -- contenders --------------------------------------------------------------------------------------------------------


def llama(x: Tensor, w: Tensor) -> Tensor:
    """The model code of Llama's RMSNorm."""
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def layer(x: Tensor, w: Tensor) -> Tensor:
    """A LayerNorm without bias, as Cohere writes it."""
    h = x.float()
    h = h - h.mean(-1, keepdim=True)
    return (w.float() * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS))).to(x.dtype)


def composed(kind: str, norm: Run) -> Run:
    """An operator of the family as model code around a norm (x, w) -> y."""
    if kind == "norm_add":
        return lambda x, r, w: r + norm(x, w)
    if kind == "qk_norm":
        return lambda q, k, w, v: (norm(q, w), norm(k, v))

    def add(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        s = x + r
        return norm(s, w), s

    def sandwich(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        s = r + norm(x, w)
        return norm(s, v), s

    return sandwich if kind == "norm_add_norm" else add if kind.startswith("add_") else norm


def ours(kind: str, cast: str) -> Run:
    """The operator of that name."""
    import normfuse.ops  # noqa: F401  registers the operators

    op, how = getattr(torch.ops.normfuse, kind).default, (EPS, 0.0, cast)
    if kind in ("norm_add_norm", "qk_norm"):
        return lambda x, r, w, v: op(x, r, w, None, v, None, *how)
    return lambda *tensors: op(*tensors, None, *how)


def contenders(kind: str) -> dict[str, Run]:
    """What is measured by name, each of the tensors that `drawn` gives."""
    rms = "layer" not in kind
    spelled = composed(kind, llama if rms else layer)
    found: dict[str, Run] = {
        "eager": spelled,
        "torch": composed(kind, (lambda x, w: F.rms_norm(x, w.shape, w, EPS)) if rms else
                          (lambda x, w: F.layer_norm(x, w.shape, w, None, EPS))),
        "inductor": torch.compile(spelled, dynamic=False),
        "normfuse": ours(kind, "first" if rms else "last"),
    }  # fmt: skip
    return found | (dict(peers(kind)) if rms else {})


def peers(kind: str) -> Iterator[tuple[str, Run]]:
    """Liger and QuACK, where they can be imported: their fused addition, else model code around their norm.

    QuACK rounds otherwise than Llama: it normalises the sum before it is rounded, and multiplies before it rounds.
    """
    add = kind == "add_rms_norm"
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # type: ignore[import-not-found, unused-ignore]

        yield "liger", composed(kind, lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False))
        if add:
            from liger_kernel.ops.fused_add_rms_norm import (  # type: ignore[import-not-found, unused-ignore]
                LigerFusedAddRMSNormFunction,
            )

            fused = LigerFusedAddRMSNormFunction.apply
            yield "liger fused", lambda x, r, w: fused(x, r, w, EPS, 0.0, "llama", False)
    except ImportError:
        pass
    try:
        from quack import rmsnorm  # type: ignore[import-not-found, unused-ignore]

        yield "quack", composed(kind, lambda x, w: rmsnorm(x, w, eps=EPS))
        if add:
            yield "quack fused", lambda x, r, w: rmsnorm(x, w, residual=r, eps=EPS, prenorm=True)
    except ImportError:
        pass


def drawn(kind: str, m: int, n: int, dtype: torch.dtype, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of data and the weights of an operator: m rows each, of query and key together."""
    made = partial(torch.randn, device=device, dtype=dtype)
    if kind == "qk_norm":
        tokens = max(1, m // (HEADS + KV_HEADS))
        heads = made(1, tokens, HEADS + 2 * KV_HEADS, n).transpose(1, 2)
        return [heads[:, :HEADS], heads[:, HEADS : HEADS + KV_HEADS]], [made(n), made(n)]
    data = [made(m, n) for _ in range(2 if "add" in kind else 1)]
    return data, [made(n) for _ in range(2 if kind == "norm_add_norm" else 1)]


# -- time --------------------------------------------------------------------------------------------------------------


def graph(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """The calls as one CUDA graph, captured on the current stream: a backward runs on the stream of its forward."""
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=torch.cuda.current_stream()):
        for call in calls:
            call()
    return captured.replay


def milliseconds(calls: list[Callable[[], object]], repeats: int = 20) -> dict[str, float]:
    """Median and quartiles of one call, in a graph of all where that can be captured."""
    for call in calls:
        call()  # compile
    torch.cuda.synchronize()
    try:
        run, graphed = graph(calls), True
    except Exception:  # a contender that synchronises, or allocates in its own way
        torch.cuda.synchronize()
        run, graphed = (lambda: [call() for call in calls]), False
    run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(calls))
    low, middle, high = statistics.quantiles(times, n=4)
    return {"ms": middle, "q1": low, "q3": high, "graph": float(graphed)}


def rounds(moved: int) -> int:
    """How many sets of inputs it takes to leave the cache, where each moves so many bytes."""
    return max(1, min(64, -(-FLUSH // moved)))


def tuples(value: Any) -> tuple[Tensor, ...]:
    """An operator's results."""
    return value if isinstance(value, tuple) else (value,)


def backward_of(run: Run, data: list[Tensor], weights: list[Tensor]) -> Callable[[], object]:
    """The backward alone, its forward having been run: every gradient, given one for each result."""
    leaves = [t.detach().requires_grad_() for t in (*data, *weights)]
    results = tuples(run(*leaves))
    gradients = [torch.randn_like(y) for y in results]
    return lambda: torch.autograd.grad(results, leaves, gradients, retain_graph=True)


def measure(kind: str, m: int, n: int, name: str, device: str = "cuda") -> Iterator[dict[str, Any]]:
    """All contenders on one shape, forward and backward; before each a copy of as many bytes."""
    torch._dynamo.reset()
    first, weights = drawn(kind, m, n, TYPES[name], device)
    size = sum(t.nbytes for t in first[: 2 if kind == "qk_norm" else 1])
    sets = [first, *(drawn(kind, m, n, TYPES[name], device)[0] for _ in range(rounds(2 * size) - 1))]
    about = {"kind": kind, "type": name, "rows": m, "n": n}
    for what, factor in zip(("forward", "backward"), KINDS[kind], strict=True):
        moved = factor * size
        copied = [torch.empty(moved // 2, device=device, dtype=torch.uint8) for _ in range(rounds(moved))]
        copy = milliseconds([c.clone for c in copied])
        del copied
        yield about | {"what": what, "who": "copy", "GB/s": moved / copy["ms"] / 1e6, "share": 1.0} | copy
        for who, run in contenders(kind).items():
            try:
                if what == "forward":
                    with torch.no_grad():
                        took = milliseconds([partial(run, *data, *weights) for data in sets])
                else:
                    took = milliseconds([backward_of(run, data, weights) for data in sets])
            except Exception as error:  # a contender that does not take this shape is no reason to stop
                yield about | {"what": what, "who": who, "error": f"{type(error).__name__}: {str(error)[:200]}"}
                continue
            rates = {"GB/s": moved / took["ms"] / 1e6, "share": copy["ms"] / took["ms"]}
            yield about | {"what": what, "who": who} | rates | took


def shapes(kind: str, widths: Sequence[int], rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(rows, N) to measure an operator on; heads are narrow, and a token has some."""
    for n, m in itertools.product(widths, rows):
        if m * n <= MOST and (kind != "qk_norm" or (n <= WIDEST_HEAD and m >= HEADS + KV_HEADS)):
            yield m, n


def show(rows: list[dict[str, Any]]) -> str:
    """The results of one shape."""
    lines = [[r["who"], r["what"], f"{r['ms']:.4f}", f"{r['GB/s']:.0f}", f"{r['share']:.2f}"] if "ms" in r else
             [r["who"], r["what"], r["error"][:40], "", ""] for r in rows]  # fmt: skip
    title = "{kind} {type} {rows} x {n}".format(**rows[0])
    return f"{title}\n" + table(["who", "what", "ms", "GB/s", "share"], lines, 2)


# -- tuning ------------------------------------------------------------------------------------------------------------


def candidates(n: int, itemsize: int, tensors: int) -> Iterator[Any]:
    """Tiles around the one that `launch.config` gives."""
    from normfuse.ops.launch import Config, config

    base = config(n, itemsize, tensors)
    for block in {base.block, min(base.block, 4096), min(base.block, 8192)}:
        for rows in {1, base.rows, max(1, base.rows // 2), max(1, base.rows // 4), base.rows * 2}:
            for warps in (1, 2, 4, 8, 16, 32):
                per_thread = rows * block / (32 * warps)
                if (rows == 1 or block >= n) and 4 <= per_thread <= 64:
                    loop = tensors > 2
                    for programs, stages in itertools.product((132, 264, 528), (1, 3, 4)) if loop else ((0, 1),):
                        yield Config(rows, block, warps, programs, stages)


def tune(names: list[str], widths: tuple[int, ...], m: int = 8192) -> dict[str, Any]:
    """The best tile of each (block, bytes, tensors); only what beats `launch.config` by 2 % is printed."""
    from normfuse.ops import launch

    better: dict[str, Any] = {}
    for name in names:
        for n in widths:
            dtype, rows = TYPES[name], min(m, MOST // 8 // n)
            xs = [torch.randn(rows, n, device="cuda", dtype=dtype)
                  for _ in range(rounds(2 * rows * n * dtype.itemsize))]  # fmt: skip
            w = torch.randn(n, device="cuda", dtype=dtype)
            jobs: dict[int, Run] = {
                1: lambda x, w=w: launch.norm(x, w, None, EPS, 0.0, "first"),
                2: lambda x, w=w: launch.norm_backward(x, x, w, None, None, EPS, 0.0, "rms_norm", False, False),
                3: lambda x, w=w: launch.norm_backward(x, x, w, None, None, EPS, 0.0, "rms_norm", True, False),
                4: lambda x, w=w: launch.norm_add_norm_backward(x, x, x, x, w, None, w, None, EPS, 0.0, "rms_norm",
                                                                [True, False, True, False]),
            }  # fmt: skip
            for tensors, job in jobs.items():
                key = (1 << (n - 1).bit_length(), dtype.itemsize, tensors)
                launch.TUNED.pop(key, None)
                before, best = launch.config(n, dtype.itemsize, tensors), {}
                for tile in (before, *candidates(n, dtype.itemsize, tensors)):
                    launch.TUNED[key] = tile
                    launch._plan.cache_clear()
                    launch._plan_backward.cache_clear()
                    try:
                        best[tile] = milliseconds([lambda x=x, job=job: job(x) for x in xs], 10)["ms"]  # type: ignore[misc]
                    except Exception as error:  # out of registers or shared memory: not a candidate
                        print(f"{key} {tuple(tile)}: {type(error).__name__}")
                del launch.TUNED[key]
                winner = min(best, key=best.__getitem__)
                print(f"{key}: {tuple(before)} {best[before]:.4f} ms, best {tuple(winner)} {best[winner]:.4f} ms",
                      flush=True)  # fmt: skip
                if best[winner] < 0.98 * best[before]:
                    better[str(key)] = tuple(winner)
    print("TUNED = {" + ", ".join(f"{key}: Config{tile}" for key, tile in better.items()) + "}")
    return better


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few shapes, one type")
    parser.add_argument("--tune", action="store_true", help="look for better tiles instead")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=None)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=None)
    parser.add_argument("--widths", type=int, nargs="+", help="N (128 and 4096 with --quick)")
    parser.add_argument("--rows", type=int, nargs="+", help="how many (16 and 4096 with --quick)")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("tests.bench.kernels needs a CUDA GPU, and there is none")
        return
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        run(given)


def run(given: argparse.Namespace) -> None:
    """What was asked for, on a stream that can be captured."""
    names = given.types or (["bf16"] if given.quick else list(TYPES))
    widths = given.widths or (QUICK_WIDTHS if given.quick else WIDTHS)
    rows = given.rows or (QUICK_ROWS if given.quick else ROWS)
    if given.tune:
        tune(names, widths)
        return
    device = {"name": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    versions = {name: version(name) for name in ("triton", "liger-kernel", "quack-kernels")}
    results: list[dict[str, Any]] = []
    for kind, name in itertools.product(given.kinds or KINDS, names):
        for m, n in shapes(kind, widths, rows):
            found = list(measure(kind, m, n, name))
            results += found
            print(show(found), end="\n\n", flush=True)
        # at once: the next may run out of time
        save(given.out, {"device": device, "versions": versions, "results": results})


def version(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
