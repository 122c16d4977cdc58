"""The operators on DTensors in two processes: sharded operators, tensor and sequence parallel, FSDP2.

Each worker compares itself with the whole computed in its own process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import normfuse.ops  # noqa: F401  registers the operators
from normfuse.ops.checks import KINDS

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
EPS = 1e-6
OLD = tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 13)


def in_two_processes(work: Callable[..., None], meeting: Path, *args: Any) -> None:
    spawn: Any = torch.multiprocessing.spawn  # type: ignore[attr-defined]
    spawn(_worker, (str(meeting / "meeting"), work, args), nprocs=2)


def _worker(rank: int, meeting: str, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        work(*args)
        dist.barrier()  # neither leaves while the other still speaks to it
    finally:
        dist.destroy_process_group()


def communication() -> Any:
    """Counts the collectives in a `with` block."""
    from torch.distributed.tensor.debug import CommDebugMode

    mode: Any = CommDebugMode
    return mode()


def mesh() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2,))


def whole(t: Any) -> Tensor:
    found: Tensor = t.full_tensor() if hasattr(t, "full_tensor") else t
    return found


# -- each operator -----------------------------------------------------------------------------------------------------

OPERATORS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("rms_norm", ("x", "w", "b")), ("layer_norm", ("x", "w", "b")), ("add_rms_norm", ("x", "x", "w", "b")),
    ("add_layer_norm", ("x", "x", "w", "b")), ("norm_add", ("x", "x", "w", "b")),
    ("norm_add_norm", ("x", "x", "w", "b", "w", "b")), ("qk_norm", ("x", "k", "w", "b", "w", "b")),
)  # fmt: skip
SHAPES = {"x": (4, 6, 2, 8), "k": (2, 6, 8), "w": (8,), "b": (8,)}


def each_operator() -> None:
    """Rows sharded on every axis, or not at all; with all parameters, some, or none; all results read, or one."""
    from torch.distributed.tensor import Replicate, Shard

    for name, roles in OPERATORS:
        for how in [{}] if name not in ("norm_add", "norm_add_norm", "qk_norm") else [{"kind": kind} for kind in KINDS]:
            for parameters in ("wb", "w", ""):
                tensors = [torch.randn(SHAPES[r]) if r in "xk" + parameters else None for r in roles]
                for placement in (Replicate(), Shard(0), Shard(1), Shard(-1)):
                    for used in (slice(None), slice(0, 1), slice(1, 2)):
                        one_operator(name, roles, tensors, placement, used, how)


def one_operator(name: str, roles: tuple[str, ...], tensors: list[Tensor | None], placement: Any, used: slice,
                 how: dict[str, Any]) -> None:  # fmt: skip
    from torch.distributed.tensor import Partial, Replicate, distribute_tensor

    def leaf(role: str, t: Tensor | None) -> Any:
        if t is None:
            return None
        where = placement if role in "xk" else Replicate()
        return distribute_tensor(t, mesh(), [where]).requires_grad_()

    def run(args: list[Any]) -> tuple[list[Any], list[Any]]:
        found = getattr(torch.ops.normfuse, name)(*args, EPS, **how)
        read = (found if isinstance(found, tuple) else (found,))[used]
        leaves = [t for t in args if t is not None]
        return list(read), list(torch.autograd.grad(sum(t.square().sum() for t in read), leaves, allow_unused=True))

    if used.start and not name.startswith(("add", "qk", "norm_add_norm")):
        return
    sharded = [leaf(*pair) for pair in zip(roles, tensors, strict=True)]
    with communication() as moved, torch.no_grad():
        getattr(torch.ops.normfuse, name)(*sharded, EPS, **how)
    gathers = getattr(placement, "dim", 0) % 4 == 3
    assert gathers or moved.get_total_counts() == 0, name
    found, gradients = run(sharded)
    expected, exact = run([None if t is None else t.clone().requires_grad_() for t in tensors])
    for a, b in zip(found, expected, strict=True):
        assert gathers or a.placements == (placement,), (name, a.placements)
        assert torch.equal(whole(a), b), name
    for role, a, b in zip([r for r, t in zip(roles, tensors, strict=True) if t is not None], gradients, exact,
                          strict=True):  # fmt: skip
        assert (a is None) == (b is None)
        if a is not None and not gathers:
            partial = role in "wb" and placement != Replicate()
            assert a.placements == (Partial() if partial else Replicate() if role in "wb" else placement,), name
        if a is not None:
            torch.testing.assert_close(whole(a), b, rtol=1e-5, atol=1e-5)


def the_key_of_the_cache() -> None:
    """`cast`, `dtype` and what is needed decide the results: DTensor must not answer one from another's entry."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    x = distribute_tensor(torch.randn(4, 8).bfloat16(), mesh(), [Shard(0)])
    w = distribute_tensor(torch.randn(8), mesh(), [Replicate()])
    op = torch.ops.normfuse.rms_norm
    for cast, dtype, expected in (("last", None, torch.bfloat16), ("first", None, torch.float32),
                                  ("last", torch.float32, torch.float32), ("last", torch.float16, torch.float16),
                                  ("first", torch.bfloat16, torch.bfloat16)):  # fmt: skip
        for y in (op(x, w, None, EPS, 0.0, cast, dtype), op(x, w, None, eps=EPS, cast=cast, dtype=dtype)):
            assert y.dtype == y.to_local().dtype == expected
    for need in (True, False):
        dx, dw, db = torch.ops.normfuse.norm_backward(x, x, w, None, None, EPS, 0.0, "rms_norm", need, need)
        assert dw.shape == ((8,) if need else (0,)) and db.shape == (0,)
        assert whole(dx).shape == x.shape and whole(dw).shape == dw.shape and whole(db).shape == (0,)


def q_and_k_apart() -> None:
    """More ranks than heads of k: q is sharded on its heads, k replicated, and nothing moves."""
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    q, k, w = torch.randn(2, 4, 3, 8), torch.randn(2, 1, 3, 8), torch.randn(8)
    a, b = distribute_tensor(q, mesh(), [Shard(1)]), distribute_tensor(k, mesh(), [Replicate()])
    u, v = (distribute_tensor(w, mesh(), [Replicate()]).requires_grad_() for _ in range(2))
    with communication() as moved:
        y, z = torch.ops.normfuse.qk_norm(a, b, u, None, v, None, EPS)
        gradients = torch.autograd.grad((y, z), (u, v), (y, z))
    assert moved.get_total_counts() == 0
    assert [t.placements for t in (y, z, *gradients)] == [(p,) for p in (Shard(1), Replicate(), Partial(), Replicate())]


def operators() -> None:
    each_operator()
    the_key_of_the_cache()
    q_and_k_apart()


def test_operators(tmp_path: Path) -> None:
    in_two_processes(operators, tmp_path)


# -- a model -----------------------------------------------------------------------------------------------------------


class Norm(nn.Module):
    """An RMSNorm as models write it, or the operator; with a residual, the sum too."""

    def __init__(self, n: int, written: bool) -> None:
        super().__init__()
        self.weight, self.written = nn.Parameter(torch.rand(n) + 0.5), written

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if not self.written:
            if residual is None:
                return torch.ops.normfuse.rms_norm(x, self.weight, None, EPS, cast="first")
            return torch.ops.normfuse.add_rms_norm(x, residual, self.weight, None, EPS, cast="first")
        s = x if residual is None else residual + x
        h = s.to(torch.float32)
        y = self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(s.dtype)
        return y if residual is None else (y, s)


class HeadNorms(nn.Module):
    """The norms of q and k."""

    def __init__(self, n: int, written: bool) -> None:
        super().__init__()
        self.q, self.k, self.written = Norm(n, written), Norm(n, written), written

    def forward(self, q: Tensor, k: Tensor) -> Any:
        if self.written:
            return self.q(q), self.k(k)
        return torch.ops.normfuse.qk_norm(q, k, self.q.weight, None, self.k.weight, None, EPS, cast="first")


class Block(nn.Module):
    """A decoder layer of Qwen 3: 4 heads of 8."""

    def __init__(self, written: bool) -> None:
        super().__init__()
        self.norm1, self.norm2, self.heads = Norm(32, written), Norm(32, written), HeadNorms(8, written)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(32, 32, bias=False) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(32, 64, bias=False), nn.Linear(32, 64, bias=False), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (w(h).unflatten(-1, (4, 8)) for w in (self.wq, self.wk, self.wv))
        q, k = self.heads(q, k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1)
        h, s = self.norm2(self.wo((scores @ v).transpose(1, 2).flatten(-2)), residual=x)
        out: Tensor = s + self.down(F.silu(self.gate(h)) * self.up(h))
        return out


def pair(inner: str | None) -> tuple[Block, Block]:
    """A written-out block, and one of the same weights to distribute: with the operators, or for a backend to fuse."""
    torch.manual_seed(1)
    plain, other = Block(written=True), Block(written=inner is not None)
    other.load_state_dict(plain.state_dict())
    return plain, other


def compiled(block: Block, inner: str | None) -> Any:
    return block if inner is None else torch.compile(block, backend="normfuse", options={"inner": inner})


def tensor_and_sequence_parallel(inner: str | None) -> None:
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

    plain, block = pair(inner)
    columns = ColwiseParallel(input_layouts=Shard(1), use_local_output=False)
    back = RowwiseParallel(output_layouts=Shard(1), use_local_output=False)
    rows = SequenceParallel(use_local_output=False)
    parallelize_module(block, mesh(), {
        "norm1": rows, "norm2": rows, "wq": columns, "wk": columns, "wv": columns, "wo": back,
        "gate": columns, "up": columns, "down": back,
    })  # fmt: skip
    distribute_module(block.heads, mesh())
    x = torch.randn(2, 6, 32)
    given, exact = distribute_tensor(x, mesh(), [Shard(1)]).requires_grad_(), x.clone().requires_grad_()
    found, expected = compiled(block, inner)(given), plain(exact)
    assert found.placements == (Shard(1),)
    torch.testing.assert_close(whole(found), expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(whole(given.grad), exact.grad)
    for (name, a), b in zip(block.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(whole(a.grad), b.grad, rtol=1e-4, atol=1e-4, msg=name)


def fully_sharded(inner: str | None) -> None:
    """Two steps of FSDP2 on half a batch each."""
    from torch.distributed.fsdp import fully_shard

    plain, block = pair(inner)
    fully_shard(block, mesh=mesh())
    models = [plain, compiled(block, inner)]
    x = torch.randn(4, 6, 32)
    half = x.chunk(2)[dist.get_rank()]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (plain, block)]
    for _ in range(2):
        for model, batch, optimizer in zip(models, (x, half), optimizers, strict=True):
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, a), b in zip(block.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(whole(a), b, msg=name)


def models(inner: str | None) -> None:
    for work in (tensor_and_sequence_parallel, fully_sharded):
        work(inner)
        if inner is not None:
            from normfuse.backend import last_report

            report = last_report()
            made = {norm.emitted for norm in report.norms if norm.action == "fused"} if report else set()
            assert {"normfuse.qk_norm", "normfuse.add_rms_norm"} <= made


@pytest.mark.skipif(OLD, reason="torch before 2.13 flattens only a leading axis in parts")
@pytest.mark.parametrize("inner", [None, *(pytest.param(n, marks=pytest.mark.slow) for n in ("aot_eager", "inductor"))])
def test_models(inner: str | None, tmp_path: Path) -> None:
    """Eager with the operators; compiled from a block that writes its norms out."""
    in_two_processes(models, tmp_path, inner)


class Stack(nn.Module):
    """Residual blocks with torch's own norms."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.ModuleList(nn.Linear(32, 32) for _ in range(3)) for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(32, eps=EPS) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            x = x + down(F.silu(up(norm(x))))
        out: Tensor = self.norms[3](x)
        return out


def local_tensors() -> None:
    """Sequence parallel as PyTorch's tutorial has it: local tensors between the modules, then parts of others."""
    import torch.distributed.tensor.parallel as tp
    from torch.distributed.tensor import Replicate, Shard

    from normfuse.backend import last_report

    torch.manual_seed(1)
    plain, stack = Stack(), Stack()
    stack.load_state_dict(plain.state_dict())
    rows = tp.PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    for i in range(3):
        tp.parallelize_module(stack.up[i], mesh(), rows)
        tp.parallelize_module(stack, mesh(), {
            f"up.{i}": tp.ColwiseParallel(), f"norms.{i}": tp.SequenceParallel(),
            f"down.{i}": tp.RowwiseParallel(output_layouts=Shard(1)),
        })  # fmt: skip
    tp.parallelize_module(stack, mesh(), {"norms.3": tp.SequenceParallel()})
    x = torch.randn(2, 6, 32)
    part = x.chunk(2, 1)[dist.get_rank()]
    found = torch.compile(stack, backend="normfuse", fullgraph=True, options={"inner": "aot_eager"})(part)
    torch.testing.assert_close(whole(found), plain(x))
    report = last_report()
    assert report is not None and len(report.norms) == 4


@pytest.mark.skipif(OLD, reason="torch before 2.13 flattens only a leading axis in parts")
def test_local_tensors(tmp_path: Path) -> None:
    in_two_processes(local_tensors, tmp_path)
