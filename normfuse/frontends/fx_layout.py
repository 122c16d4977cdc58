"""Whether results may lie in memory in another way than the model's: whoever reads them is run on meta tensors.

A sum lies as its summands do. Where these do not agree, as in a vision transformer without a class token, whose patches
are a transposed convolution, a fused operator may give it contiguous, and all that is computed of it then lies in
another way, too. That is allowed where every reader runs on it and the outputs of the graph lie as they did.
"""

from __future__ import annotations

import heapq
import itertools
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from normfuse.frontends.fx_effects import RANDOM, drops, known, name_of, shared, written
from normfuse.frontends.fx_meta import MISSING, is_tensor, meta_of, size_of

MOST = 8
"""Ways in which a result may come to lie, and combinations of those of operands, that are looked at."""
TELLING = RANDOM | frozenset(
    """as_strided as_strided_copy as_strided_scatter stride storage_offset is_contiguous is_non_overlapping_and_dense
    data_ptr untyped_storage storage
    conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d""".split()
)
"""What gives other values for a tensor that lies in another way, or whose own results lie as a device likes best."""
SPACES = ("", "normfuse")
"""Whose operators take a tensor as it lies: torch's, and ours."""
Ways = dict[Any, Any]
"""A result as meta tensors, by the strides of each."""


class Layouts:
    """The results of a graph that may come to lie in several ways, and those ways."""

    def __init__(self) -> None:
        self.ways: dict[fx.Node, Ways] = {}
        self.symbols: dict[str, int] = {}
        self.runs: dict[Any, tuple[Any, bool] | None] = {}

    def plain(self, meta: Any) -> Any:
        """A meta tensor of the sizes and strides of a tensor's meta, with numbers for symbols."""
        stride = meta.stride() if isinstance(meta, torch.Tensor) else meta.stride
        sizes, strides = ([size_of(d, self.symbols) for d in given] for given in (meta.shape, stride))
        return torch.empty_strided(sizes, strides, dtype=meta.dtype, device="meta")

    def allow(self, results: dict[fx.Node, torch.Tensor]) -> bool:
        """Whether results may lie as these tensors do, whatever has been allowed before; if so, it is kept in mind."""
        found, waiting = dict(self.ways), list[fx.Node]()
        for node, way in results.items():
            if key(way) not in found.get(node, {}):
                found[node] = self._traced(node, found) | {key(way): way}
                waiting += node.users
        heapq.heapify(waiting)
        last = None
        while waiting:
            node = heapq.heappop(waiting)
            if node is last:
                continue
            last = node
            more = self._results(node, found)
            if more is None:
                return False
            before = self._traced(node, found)
            if not more.keys() <= before.keys():
                found[node] = before | more
                for user in node.users:
                    heapq.heappush(waiting, user)
        self.ways = found
        return True

    def _plain(self, meta: Any) -> Any:
        """Any meta with meta tensors, and numbers, in it."""
        def leaf(one: Any) -> Any:
            return self.plain(one) if is_tensor(one) else size_of(one, self.symbols) if hasattr(one, "node") else one

        return pytree.tree_map(leaf, meta, is_leaf=is_tensor)

    def _traced(self, node: fx.Node, found: dict[fx.Node, Ways]) -> Ways:
        """The ways known of a result: at first that of the trace."""
        if node not in found:
            made = self._plain(meta_of(node))
            return {key(made): made}
        return found[node]

    def _results(self, node: fx.Node, found: dict[fx.Node, Ways]) -> Ways | None:
        """The ways in which the results of a node may come to lie; None where that cannot be told, or must not be."""
        if node.op not in ("call_function", "call_method") or not known(node) or drops(node) or written(node):
            return None
        space, _, bare = (name_of(node) or "").rpartition("::")
        metas = [meta_of(n) for n in (node, *node.all_input_nodes)]
        if space not in SPACES or bare in TELLING or any(meta is MISSING for meta in metas):
            return None
        operands = [n for n in node.all_input_nodes if len(found.get(n, ())) > 1]
        several = list(itertools.islice(itertools.product(*(found[n].items() for n in operands)), MOST + 1))
        if len(several) > MOST:
            return None
        more, copies = Ways(), set[bool]()
        for ways in several:
            which = node, *((n, strides) for n, (strides, _) in zip(operands, ways, strict=True))
            if which not in self.runs:  # one walk that ends in a refusal goes where the next one does
                self.runs[which] = self._run(node, {n: way for n, (_, way) in zip(operands, ways, strict=True)})
            run = self.runs[which]
            if run is None:
                return None
            more[key(run[0])] = run[0]
            copies.add(run[1])
        if len(more) > MOST or (len(copies) > 1 and _given(node)):
            return None
        return more

    def _run(self, node: fx.Node, ways: dict[fx.Node, Any]) -> tuple[Any, bool] | None:
        """A result, and whether it has memory of its own; None where the operator takes no tensors that lie so."""
        def operand(n: fx.Node) -> Any:
            return ways[n] if n in ways else self._plain(meta_of(n))

        target: Any = node.target
        try:
            args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
            with torch.no_grad():
                made = (getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else
                        target(*args, **kwargs))  # fmt: skip
        except Exception:  # a view of what lies so is none
            return None
        own, results = ({t.untyped_storage()._cdata for t in _tensors(v)} for v in (list(ways.values()), made))
        return made, own.isdisjoint(results)


def key(made: Any) -> Any:
    """Strides, those of axes of size 1 aside."""
    return tuple(tuple(s for d, s in zip(t.shape, t.stride(), strict=True) if d != 1) for t in _tensors(made))


def _tensors(made: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(made) if isinstance(t, torch.Tensor)]


def _given(node: fx.Node) -> bool:
    """Whether a graph gives a result, or a view of it."""
    views = [node]
    for view in views:
        views += [user for user in view.users if view in shared(user) and user not in views]
    return any(user.op == "output" for view in views for user in view.users)
