"""One FX node being lowered, and what the rows of the operator table share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import fx

from normfuse.frontends.fx_meta import is_tensor, meta_of
from normfuse.graph import Shape, Value

if TYPE_CHECKING:
    from normfuse.frontends.fx import Lowering


class Arguments:
    """Those of a node, by position or name."""

    low: Lowering
    node: fx.Node

    def get(self, i: int, *names: str, default: Any = None) -> Any:
        """The i-th argument, or the one of these names."""
        if 0 <= i < len(self.node.args):
            return self.node.args[i]
        return next((self.node.kwargs[n] for n in names if n in self.node.kwargs), default)


class Call(Arguments):
    """One node being lowered."""

    def __init__(self, low: Lowering, node: fx.Node) -> None:
        self.low, self.node = low, node

    def value(self, i: int, *names: str, like: Value | None = None) -> Value | None:
        """A tensor operand, or a number as a constant."""
        return self.low.operand(self.get(i, *names), like)

    def number(self, i: int, *names: str, default: float | None = None) -> float | None:
        """An argument that has to be a number, or a node known to give one; raises `Unfit` for anything else."""
        found = self.get(i, *names, default=default)
        if isinstance(found, fx.Node):
            value = self.low.operand(found)
            found = value.number if value is not None else None
            if found is None:
                raise Unfit
        if found is not None and not isinstance(found, (int, float)):
            raise Unfit
        return found

    def tensor(self, i: int = 0, *names: str) -> Value:
        """A tensor operand of known rank; raises `Unfit` where it is none."""
        found = self.value(i, *(names or ("input", "self", "a", "x")))
        if found is None or found.shape is None:
            raise Unfit
        return found

    def outs(self, count: int) -> tuple[Value | None, ...]:
        """The results of a node that gives several; raises `Unfit` where it gives another number of them."""
        metas = meta_of(self.node)
        if is_tensor(metas) or not isinstance(metas, (tuple, list)) or len(metas) != count:
            raise Unfit
        return self.low.outs(self.node)

    def emit(self, kind: str, inputs: list[Value], out: Value | None = None, **attrs: Any) -> bool:
        """Append a neutral node."""
        self.low.emit(kind, inputs, self.node, out, **attrs)
        return True

    def emit_to(self, kind: str, inputs: list[Value], out: Value, **attrs: Any) -> Value:
        """Append a neutral node that gives a value; the value."""
        return self.low.emit(kind, inputs, self.node, out, **attrs)


R = TypeVar("R")


def by_name(rows: dict[str, R]) -> dict[str, R]:
    """A table whose keys are several names each."""
    return {name: row for names, row in rows.items() for name in names.split()}


class Unfit(Exception):
    """The arguments are of a kind that a row does not know."""


Row = Callable[[Call], bool]


def guarded(row: Row) -> Row:
    """A row that leaves the node opaque where its arguments do not fit."""

    def safe(call: Call) -> bool:
        try:
            return row(call)
        except Unfit:
            return False

    return safe


FOLD: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "pow": lambda a, b: float(a**b),
    "neg": lambda a: -a,
    "abs": abs,
    "square": lambda a: a * a,
    "sqrt": math.sqrt,
    "rsqrt": lambda a: 1.0 / math.sqrt(a),
    "reciprocal": lambda a: 1.0 / a,
    "max": max,
}
VIEWS = frozenset("cast identity reshape unsqueeze squeeze expand transpose".split())


def fold(kind: str, numbers: Sequence[float | None]) -> float | None:
    """The result of an operation on tensors that are numbers all over."""
    known = [c for c in numbers if c is not None]
    if len(known) < len(numbers) or not known:
        return None
    if kind in VIEWS:
        return known[0]
    if kind not in FOLD:
        return None
    try:
        return float(FOLD[kind](*known))
    except (ArithmeticError, ValueError, TypeError):
        return None


def axes_of(dim: Any, rank: int) -> tuple[int, ...]:
    """Axes counted from the front; all of them for None or an empty list."""
    if dim is None or (isinstance(dim, (tuple, list)) and not dim):
        return tuple(range(rank))
    dims = dim if isinstance(dim, (tuple, list)) else [dim]
    if not all(isinstance(d, int) and not isinstance(d, bool) and -max(rank, 1) <= d < max(rank, 1) for d in dims):
        raise Unfit
    return tuple(sorted({d % rank for d in dims})) if rank else ()


def shape_of_pair(a: Value, b: Value) -> Shape | None:
    """The shape of an elementwise result, or None where symbols leave it open."""
    if a.shape is None or b.shape is None:
        return None
    n = max(len(a.shape), len(b.shape))
    pairs = zip((1,) * (n - len(a.shape)) + a.shape, (1,) * (n - len(b.shape)) + b.shape, strict=True)
    out = []
    for p, q in pairs:
        if p != q and 1 not in (p, q):
            return None
        out.append(q if p == 1 else p)
    return tuple(out)
