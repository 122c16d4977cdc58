"""Whether results may lie in memory in another way than the model's: what reads them is run on meta tensors.

A sum lies as its summands do. Where these do not agree, as in a vision transformer without a class token, whose patches
are a transposed convolution, a fused operator may give it contiguous, and all that is computed of it then lies in
another way, too. That is allowed where each reader is of `READERS` and runs on it, and no output of the graph shows it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from normfuse.frontends.fx_effects import drops, given, name_of, nodes_in, written
from normfuse.frontends.fx_meta import MISSING, is_tensor, meta_of, size_of

MOST = 8
"""Ways in which a result may come to lie, and combinations of those of operands, that are looked at."""
READERS = frozenset(
    """add __add__ __radd__ sub subtract __sub__ rsub __rsub__ mul multiply __mul__ __rmul__ div divide true_divide
    truediv __truediv__ neg pow __pow__ square sqrt rsqrt abs exp sigmoid tanh relu gelu silu to _to_copy float half
    bfloat16 double dropout layer_norm native_layer_norm linear matmul __matmul__ mm bmm addmm baddbmm sum mean amax
    amin var std getitem select slice narrow transpose permute swapaxes unsqueeze squeeze view expand chunk split
    split_with_sizes unbind clone""".split()
)
"""Operators whose results lie alike on every device, and are views for all ways of an operand, or for none."""
SIZES = (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049, 1051, 1061, 1063, 1069, 1087, 1091, 1093, 1097)
"""What symbols stand for: so large that what is computed of one is a size above 1."""
Ways = dict[Any, Any]
"""A result as meta tensors, by the strides of each."""


class _Minds(Exception):
    """A reader takes no tensor that lies so, or the graph would show it."""


class Layouts:
    """The results of a graph that may come to lie in several ways, and those ways."""

    def __init__(self, writes: bool) -> None:
        self.writes = writes  # somewhere in the graph, in place
        self.ways: dict[fx.Node, Ways] = {}
        self.followers: dict[fx.Node, dict[fx.Node, None]] = {}
        self.minded: set[fx.Node] = set()
        self.symbols: dict[str, int] = {}

    def plain(self, meta: Any) -> Any:
        """A meta tensor of the sizes and strides of a tensor's meta, with numbers for symbols."""
        stride = meta.stride() if isinstance(meta, torch.Tensor) else meta.stride
        sizes, strides = ([size_of(d, self.symbols, SIZES) for d in given] for given in (meta.shape, stride))
        return torch.empty_strided(sizes, strides, dtype=meta.dtype, device="meta")

    def follow(self, result: fx.Node, operand: fx.Node) -> None:
        """Say that an operator may stand for `result`, which then lies as ``torch.empty_like`` of the operand does."""
        self.followers.setdefault(operand, {})[result] = None

    def fix(self, node: fx.Node) -> bool:
        """Have a result lie as the model's does; False where it may lie in another way by now."""
        self.minded.add(node)
        return node not in self.ways

    def allow(self, results: Sequence[tuple[fx.Node, fx.Node]]) -> bool:
        """Whether results may lie as their operands do, or contiguous, whatever has been allowed before."""
        found, waiting = dict(self.ways), list[fx.Node]()
        last: fx.Node | None = None
        try:
            for result, operand in results:
                self._grow(result, self._like(result, self._known(operand, found)), found, waiting)
            while waiting:
                node = heappop(waiting)
                if node is not last:
                    last = node
                    self._grow(node, self._results(node, found), found, waiting)
        except _Minds:
            todo = [n for n in last.all_input_nodes if n in found] if last is not None else []
            for n in todo:  # what leads here need not be followed again
                if n not in self.minded:
                    self.minded.add(n)
                    todo += [before for before in n.all_input_nodes if before in found]
            return False
        self.ways = found
        for result, operand in results:
            self.follow(result, operand)
        return True

    def _known(self, node: fx.Node, found: dict[fx.Node, Ways]) -> Ways:
        """The ways known of a result: at first that of the trace."""
        if node not in found:
            made = self._plain(meta_of(node))
            return {key(made): made}
        return found[node]

    def _like(self, result: fx.Node, ways: Ways) -> Ways:
        dtype = meta_of(result).dtype
        made = [torch.empty_like(way, dtype=dtype) for way in ways.values()]
        return {key(one): one for one in made}

    def _grow(self, node: fx.Node, ways: Ways, found: dict[fx.Node, Ways], waiting: list[fx.Node]) -> None:
        """Note ways of a result and of its followers; whoever reads them is looked at again if there are new ones."""
        todo = [(node, ways)]
        while todo:
            node, ways = todo.pop()
            before = self._known(node, found)
            new = {strides: way for strides, way in ways.items() if strides not in before}
            if not new:
                continue
            found[node] = before | new
            if node in self.minded or len(found[node]) > MOST:
                raise _Minds
            for user in node.users:
                heappush(waiting, user)
            todo += [(result, self._like(result, new)) for result in self.followers.get(node, ())]

    def _plain(self, meta: Any) -> Any:
        """Any meta with meta tensors, and numbers, in it."""
        def leaf(one: Any) -> Any:
            symbol = hasattr(one, "node")
            return self.plain(one) if is_tensor(one) else size_of(one, self.symbols, SIZES) if symbol else one

        try:
            return pytree.tree_map(leaf, meta, is_leaf=is_tensor)
        except RuntimeError as why:  # a size below zero
            raise _Minds from why

    def _results(self, node: fx.Node, found: dict[fx.Node, Ways]) -> Ways:
        """The ways in which the results of a node may come to lie."""
        space, _, bare = (name_of(node) or "").rpartition("::")
        mixed = bare in ("getitem", "__getitem__") and any(is_tensor(meta_of(n)) for n in nodes_in(node.args[1:]))
        if node.op not in ("call_function", "call_method") or (space != "normfuse" if space else bare not in READERS):
            if bare != "contiguous" or space or self.writes or given(node):  # it may be a copy, and may be none
                raise _Minds
        if mixed or drops(node) or written(node) or node.kwargs.get("memory_format") is not None or any(
                meta_of(n) is MISSING for n in (node, *node.all_input_nodes)):  # fmt: skip
            raise _Minds
        operands = [n for n in node.all_input_nodes if len(found.get(n, ())) > 1]
        several = list(itertools.islice(itertools.product(*(found[n].values() for n in operands)), MOST + 1))
        if len(several) > MOST:
            raise _Minds
        made = [self._run(node, dict(zip(operands, ways, strict=True))) for ways in several]
        return {key(one): one for one in made}

    def _run(self, node: fx.Node, ways: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: ways[n] if n in ways else self._plain(meta_of(n)))
        target: Any = node.target
        try:
            with torch.no_grad():
                if node.op == "call_method":
                    return getattr(args[0], target)(*args[1:], **kwargs)
                return target(*args, **kwargs)
        except Exception as why:  # a view of what lies so is none
            raise _Minds from why


def key(made: Any) -> Any:
    """Strides, those of axes of size 1 aside."""
    tensors = [t for t in pytree.tree_leaves(made) if isinstance(t, torch.Tensor)]
    return tuple(tuple(s for d, s in zip(t.shape, t.stride(), strict=True) if d != 1) for t in tensors)
