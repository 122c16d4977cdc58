"""How DTensor shards the fused operators: rows on any leading axis, weights and biases replicated.

Where rows are sharded no operator communicates: the gradients of weight and bias come out as partial sums. A sharded
normalised axis is gathered first, or moved to another axis if DTensor finds that cheaper. q and k of `qk_norm` are
sharded each by itself, so that few heads of k may be replicated beside sharded heads of q.
"""

from __future__ import annotations

from functools import cache, partial
from itertools import product
from typing import Any

_RESULTS: dict[str, tuple[str, ...]] = {
    "norm_backward": ("x", "weight", "bias"),
    "norm_add_norm_backward": ("x", "s", "weight1", "bias1", "weight2", "bias2"),
    "qk_norm": ("q", "k"),
    "qk_norm_backward": ("q", "k", "q_weight", "q_bias", "k_weight", "k_bias"),
}
"""The argument that each result is shaped like, for operators with results that are not all like x."""


def _side(name: str) -> int:
    """1 for k and what belongs to it, 0 for everything else."""
    return int(name in ("k", "dk") or name.startswith("k_"))


def _is_parameter(name: str) -> bool:
    return "weight" in name or "bias" in name


def _acceptable(op: Any, *args: Any, **kwargs: Any) -> list[tuple[list[Any], list[Any]]]:
    """Every (placements of the results, placements of the arguments) on one mesh axis."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.placement_types import Placement

    given = [*zip((a.name for a in op._schema.arguments), args, strict=False), *kwargs.items()]
    tensors = {name: v for name, v in given if hasattr(v, "placements")}
    axes = [[v.ndim - 1 for name, v in tensors.items() if _side(name) == i and not _is_parameter(name)] for i in (0, 1)]
    results = _RESULTS.get(op._schema.name.removeprefix("normfuse::"), ("x",) * len(op._schema.returns))
    found: list[tuple[list[Any], list[Any]]] = []
    for rows in product(*([Replicate(), *map(Shard, range(min(a, default=0)))] for a in axes)):

        def place(name: str, gradient: bool, rows: tuple[Placement, ...] = rows) -> Placement:
            if not _is_parameter(name):
                return rows[_side(name)]
            return Partial() if gradient and rows[_side(name)] != Replicate() else Replicate()

        found.append(([place(name, True) for name in results],
                      [place(name, False) if name in tensors else None for name, _ in given]))  # fmt: skip
    return found


@cache
def register() -> None:
    """Tell DTensor the rules.

    Importing `torch.distributed.tensor` takes a second that most programs need not spend, so nobody calls this before
    they have imported it: the fake kernels do, which DTensor asks for the shapes before it looks for a rule.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    from normfuse.ops.register import DECOMPOSITIONS

    propagator = DTensor._op_dispatcher.sharding_propagator
    for op in DECOMPOSITIONS:
        register_sharding(op)(partial(_acceptable, op))
        names = [a.name for a in op._schema.arguments]
        # `register_sharding` lets only the tensors into the key of DTensor's cache; `cast` and `dtype` matter as well
        propagator.op_to_schema_info[op] = RuntimeSchemaInfo(names.index("eps"), names, needs_pytree=True)
