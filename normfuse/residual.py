"""Residual additions, as the fusion passes look for them."""

from __future__ import annotations

from collections.abc import Sequence

from normfuse.graph import FLOATS, Node, Value
from normfuse.norm import VIEWS
from normfuse.plan import Plan


def summed(value: Value) -> Node | None:
    """The addition of two tensors of one shape that gives a value: no number, nothing broadcast, no write in place, and
    not of a tensor and itself."""
    node = value.producer
    if node is None or node.kind != "add" or value.native is None or not value.shape:
        return None
    a, b = node.inputs
    if uncast(a) is uncast(b) or any(v.number is not None or v.dtype not in FLOATS for v in (a, b)) or value.tainted:
        return None
    return node if a.shape == b.shape == value.shape else None


def uncast(value: Value) -> Value:
    """What a value is a cast of, or the value, which an addition in torch may widen by itself."""
    node = value.producer
    return node.inputs[0] if node is not None and node.kind == "cast" and not node.inputs[0].tainted else value


def sum_of(x: Value) -> Value:
    """What a norm reads, or what that is a view of with the same rows."""
    node = x.producer
    if node is None or node.kind != "reshape" or x.tainted:
        return x
    source = node.inputs[0]
    return source if x.shape and source.shape and x.shape[-1] == source.shape[-1] else x


def is_bias(value: Value, axes: Sequence[int]) -> bool:
    """Whether a tensor that is added to a norm over axes is a bias of it: a constant that varies along these only."""
    assert value.shape  # that of the sum
    own = {axis % len(value.shape) for axis in axes}
    return value.fixed and all(size == 1 or i in own for i, size in enumerate(value.shape))


def added(value: Value, x: Value, axes: Sequence[int]) -> tuple[Value, Value] | None:
    """(the sum, the other summand), where the only reader of a norm of x, copies aside, is a residual addition.

    Where the other summand is a copy of x, it is x: what reads the one may not be told apart from what reads the other.
    """
    while len(value.uses) == 1 and not value.kept:
        node = value.uses[0]
        if not node.outputs:
            break
        if summed(node.outputs[0]) is node:
            a, b = node.inputs
            other = b if a is value else a
            if is_bias(other, axes):
                return None
            return node.outputs[0], x if _origin(other) is _origin(x) else other
        if not copies(node):
            break
        value = node.outputs[0]
    return None


def _origin(value: Value) -> Value:
    while value.producer is not None and copies(value.producer) and not value.tainted:
        value = value.producer.inputs[0]
    return value


def copies(node: Node) -> bool:
    """A cast or a view that changes nothing, dropout when not training and the like."""
    if node.kind == "cast":
        return node.inputs[0].dtype == node.outputs[0].dtype
    if node.kind in VIEWS:
        before, after = node.inputs[0].shape, node.outputs[0].shape
        whole = before is not None and None not in before and before == after
        return whole and (node.kind != "transpose" or list(node.attrs["perm"]) == sorted(node.attrs["perm"]))
    return node.kind == "identity"


def taken(plan: Plan) -> set[Value]:
    """The values that fused operators give already."""
    return {value for edit in plan.fused for value in edit.outputs}
