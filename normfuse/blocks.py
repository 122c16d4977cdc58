"""The blocks of a model, read off its graph: never off a name.

A branch is what an addition puts onto the residual stream: an addition of two tensors one of which the other was
computed from. Its parts are the summands of what is added; a part with a product of two computed tensors is attention,
one with linear layers and an activation is a feed-forward. Branches follow each other in layers, layers in stacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from normfuse.graph import Graph, Node, Value
from normfuse.norm import Site
from normfuse.placement import MIXING, THROUGH, Placer, weight

BUDGET = 40
"""Steps of the walks, per node of the graph: one with skips over skips is left without blocks, not without an end."""
NEAR = 64
SHARP = {"silu": "SiLU", "swish": "SiLU", "gelu": "GELU", "quickgelu": "QuickGELU", "mish": "Mish", "relu": "ReLU",
         "hardswish": "HardSwish", "leaky_relu": "LeakyReLU", "elu": "ELU", "softplus": "Softplus"}  # fmt: skip


@dataclass(slots=True, eq=False)
class Part:
    """One summand of a branch: its kind ("attention", "cross_attention", "feed_forward", "recurrent", "convolution",
    "linear"), what is in it, and its norms: ahead of everything, inside (each with what it is the norm of, such as
    "q"), behind it.
    """

    kind: str
    nodes: list[Node]
    details: list[str] = field(default_factory=list)
    before: list[Site] = field(default_factory=list)
    inside: list[tuple[str, Site]] = field(default_factory=list)
    after: list[Site] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Branch:
    """What one addition puts onto the stream `start`, and the norms that then stand on the stream itself."""

    start: Value
    add: Node
    parts: list[Part]
    stream: list[Site] = field(default_factory=list)


Layer = list[Branch]


def find(graph: Graph, sites: Sequence[Site]) -> list[list[Layer]]:
    """The stacks of layers of a graph (an encoder and a decoder are two), with the norms in their places."""
    return _Finder(graph, sites).run()


class _Finder:
    def __init__(self, graph: Graph, sites: Sequence[Site]) -> None:
        self.sites = sites
        self.placer = Placer(graph, sites)
        self.base = self.placer.base
        self.budget = BUDGET * len(graph.nodes) + 1000
        self.branches: list[Branch] = []
        self.by_add: dict[Node, Branch] = {}
        self.added = {self.base(v) for add in self.placer.adds for v in add.inputs}

    def run(self) -> list[list[Layer]]:
        for add in self.placer.adds:
            self._branch(add)
        self._flatten()
        holders: dict[Node, list[tuple[Branch, Part]]] = {}
        for branch in self.branches:
            for part in branch.parts:
                for node in part.nodes:
                    holders.setdefault(node, []).append((branch, part))
        for site in self.sites:
            self._hold(site, holders)
        return [list(_layers(stack)) for stack in self._stacks()]

    def _flatten(self) -> None:
        """Of a branch inside a branch keep the inner one, unless it is linear, as a low-rank detour."""
        dropped: set[int] = set()
        for outer in self.branches:
            inner = {id(found): found for part in outer.parts for node in part.nodes
                     if (found := self.by_add.get(node)) is not None and found is not outer}  # fmt: skip
            if any(part.kind != "linear" for found in inner.values() for part in found.parts):
                dropped.add(id(outer))
            else:
                dropped.update(inner)
        self.branches = [branch for branch in self.branches if id(branch) not in dropped]

    # -- branches -------------------------------------------------------------------------------------------------

    def _branch(self, add: Node) -> None:
        for skip, other in (add.inputs, add.inputs[::-1]):
            start = self.base(skip)
            parts = self._parts(start, other)
            if parts:
                self.by_add[add] = branch = Branch(start, add, parts)
                self.branches.append(branch)
                return
            before = self.by_add.get(start.producer) if start.producer is not None else None
            parts = self._parts(before.start, other) if before is not None else []
            parts = [part for part in parts if before is None or before.add not in part.nodes]
            if before is not None and parts:  # x + f(x) + g(x), added one after the other
                self.by_add[add] = before
                before.add = add
                before.parts += parts
                return

    def _parts(self, start: Value, end: Value) -> list[Part]:
        whole = self.between(start, end)
        if not any(node.kind in MIXING for node in whole):
            return []
        groups: dict[str, dict[Node, None]] = {}
        summands = self._summands(end)
        for value in summands:
            nodes = self.between(start, value) if len(summands) > 1 else whole
            kind = self._kind(start, nodes)
            if kind:
                groups.setdefault(kind, {}).update(dict.fromkeys(nodes))
        return [Part(kind, list(nodes), _details(kind, list(nodes))) for kind, nodes in groups.items()]

    def _summands(self, end: Value) -> list[Value]:
        """The values of which the end of a branch is the sum, biases left out."""
        todo, out = [end], []
        while todo:
            value = todo.pop()
            node = self.base(value).producer
            if node is not None and _adds(node) and node not in self.placer.inside and node not in self.by_add:
                moving = [v for v in node.inputs if not v.fixed and v.number is None]
                if len(moving) == 1 or all(v.shape == node.outputs[0].shape for v in moving):
                    todo.extend(moving)
                    continue
            out.append(value)
        return out

    def between(self, start: Value, end: Value) -> list[Node]:
        """The nodes on the ways from one value to another, in order; none where there is no way."""
        floor = start.producer.index if start.producer is not None else -1
        todo, seen = [end], set[Node]()
        while todo and self.budget > 0:
            value = todo.pop()
            node = value.producer
            if value is start or node is None or node in seen or node.index <= floor:
                continue
            self.budget -= 1
            seen.add(node)
            todo.extend(node.inputs)
        if todo:
            return []
        reached, out = {start}, []
        for node in sorted(seen, key=lambda n: n.index):
            if any(v in reached for v in node.inputs):
                out.append(node)
                reached.update(v for v in node.outputs if v.shape != ())  # a size read off the stream is not its value
        return out if end in reached else []

    def _kind(self, start: Value, nodes: list[Node]) -> str:
        products = [n for n in nodes if is_product(n)]
        if products:
            reached, behind = {start, *(v for n in nodes for v in n.outputs)}, _behind(products[:8], nodes)
            scores = [n for n in products if n not in behind]
            own = any(len(n.inputs) < 2 or n.inputs[1] in reached for n in scores)  # positions may be multiplied, too
            return "attention" if own else "cross_attention"
        mixing = [n for n in nodes if n.kind in MIXING]
        if not mixing:
            return ""
        if any(n.kind == "recurrent" for n in mixing):
            return "recurrent"
        if "conv" in _op(mixing[0]):
            return "convolution"
        return "feed_forward" if any(_activation(n) for n in nodes) else "linear"

    # -- norms ----------------------------------------------------------------------------------------------------

    def _hold(self, site: Site, holders: dict[Node, list[tuple[Branch, Part]]]) -> None:
        """Put a norm into the parts that it stands in, or onto the stream behind an addition."""
        x, producer = self.base(site.norm.x), site.value.producer
        if producer is None:
            return
        if site.placement == "post_residual":
            if x.producer in self.by_add and x not in self.added:  # else the stream goes on beside the norm
                self.by_add[x.producer].stream.append(site)
            return
        for branch, part in holders.get(producer, ()):
            if site.placement in ("pre", "sandwich_pre") and x is branch.start:
                part.before.append(site)
            elif site.placement in ("post", "sandwich_post"):
                part.after.append(site)
            else:
                part.inside.append((self._of(site, part), site))

    def _of(self, site: Site, part: Part) -> str:
        """What a norm inside a part is the norm of, by the products that it reaches: "q", "k", "v" or several."""
        nodes, found = set(part.nodes), dict[str, None]()
        order = [n for n in part.nodes if is_product(n)]
        later = _behind(order[:1], part.nodes)
        todo, seen = [site.value], set[Node]()
        while todo:
            value = todo.pop()
            for node in value.uses:
                if node in seen or node not in nodes:
                    continue
                if is_product(node):
                    for i, v in enumerate(node.inputs[:3]):
                        if v is value:
                            found["v" if node in later else "qkv"[i]] = None
                    continue
                seen.add(node)
                todo.extend(node.outputs)
        return "+".join(sorted(found, key="qkv".index))

    # -- layers ---------------------------------------------------------------------------------------------------

    def _stacks(self) -> list[list[Branch]]:
        stacks: list[list[Branch]] = []
        for branch in self.branches:
            if stacks and self._follows(branch.start, stacks[-1][-1].add.outputs[0]):
                stacks[-1].append(branch)
            else:
                stacks.append([branch])
        return stacks

    def _follows(self, value: Value, before: Value) -> bool:
        todo, seen = [value], set[Value]()
        while todo and len(seen) < NEAR:
            v = todo.pop(0)
            if v is before:
                return True
            if v not in seen and v.producer is not None:
                seen.add(v)
                todo.extend(v.producer.inputs)
        return False


def _layers(stack: Sequence[Branch]) -> Iterator[Layer]:
    """A layer ends with its feed-forward, or where a kind would come again; one that begins with a feed-forward ends
    where the same sequence of kinds begins again."""
    kinds = [tuple(sorted(part.kind for part in branch.parts)) for branch in stack]
    for n in range(2, len(kinds) // 2 + 1):
        if "feed_forward" in kinds[0] and len(kinds) % n == 0 and kinds == kinds[:n] * (len(kinds) // n):
            if len(set(kinds)) > 1:
                yield from (list(stack[i : i + n]) for i in range(0, len(kinds), n))
                return
            break
    layer: Layer = []
    seen: set[str] = set()
    for branch, kind in zip(stack, kinds, strict=True):
        if "feed_forward" in seen or seen.intersection(kind):
            yield layer
            layer, seen = [], set()
        layer.append(branch)
        seen.update(kind)
    if layer:
        yield layer


def is_product(node: Node) -> bool:
    """A product of two computed tensors, as attention has two of them, or the whole of it in one operator."""
    return node.kind == "attention" or (node.kind == "matmul" and not any(weight(v) for v in node.inputs))


def _behind(first: list[Node], nodes: list[Node]) -> set[Node]:
    """Those of some nodes that depend on one of `first` by way of the others."""
    found, start = set[Node](), set(first)
    for node in sorted(nodes, key=lambda n: n.index):
        if any(v.producer in start or v.producer in found for v in node.inputs):
            found.add(node)
    return found


# -- what is in a part -----------------------------------------------------------------------------------------------


def _adds(node: Node) -> bool:
    return node.kind == "add" or _op(node) in ("add_", "iadd", "__iadd__")


def _op(node: Node) -> str:
    return node.op.rsplit(".", 1)[-1].lower()


def _activation(node: Node) -> bool:
    return node.kind == "activation" or (node.kind == "max" and "relu" in _op(node))


def _details(kind: str, nodes: list[Node]) -> list[str]:
    """The activation, whether it gates another linear layer, and whether experts are chosen."""
    out: list[str] = []
    inside = set(nodes)
    gated = any(_gates(node, inside) for node in nodes if node.kind == "mul")
    if kind == "feed_forward":
        names = [name for node in nodes if (name := _name(node, inside))]
        name = max(names, key=names.count, default="")
        out.append(f"gated {name}".strip() if gated else name)
        routed = any(_op(node) in ("topk", "argmax", "max.dim") for node in nodes)
        if routed or any(n.kind == "matmul" and any(weight(v) and not v.fixed for v in n.inputs) for n in nodes):
            out.append("experts")
    elif gated:
        out.append("gated output")
    return [text for text in out if text]


def _sources(value: Value, inside: set[Node]) -> tuple[set[Value], set[Node]]:
    """Where a value comes from behind elementwise steps (linear layers, slices), and the activations between."""
    todo, seen, ends, acts = [value], set[Value](), set[Value](), set[Node]()
    while todo and len(seen) < NEAR:
        v = todo.pop()
        node = v.producer
        if v in seen or v.fixed or v.number is not None:
            continue
        seen.add(v)
        cut = node is not None and node.kind == "opaque" and node.inputs[:1] and node.inputs[0].shape != v.shape
        if node is None or node not in inside or node.kind in (*MIXING, "slice", "gather") or cut:
            ends.add(v)
            continue
        if _activation(node):
            acts.add(node)
        todo.extend(node.inputs)
    return ends, acts


def _gates(node: Node, inside: set[Node]) -> bool:
    """A product of an activated linear layer with another one."""
    a, b = node.inputs
    if any(v.fixed or v.number is not None for v in (a, b)) or a.shape != b.shape:
        return False
    (ends_a, acts_a), (ends_b, acts_b) = _sources(a, inside), _sources(b, inside)
    return bool(acts_a) != bool(acts_b) and not ends_a & ends_b and bool(ends_a) and bool(ends_b)


def _name(node: Node, inside: set[Node]) -> str:
    """The activation that a node is, or is the heart of: x * sigmoid(x) is SiLU."""
    op = _op(node)
    if not _activation(node) or not node.inputs:
        return ""
    known = next((name for key, name in SHARP.items() if op.removesuffix("_").startswith(key)), None)
    if known:
        squared = any(u.kind in ("square", "pow") or (u.kind == "mul" and u.inputs[0] is u.inputs[1])
                      for v in node.outputs for u in v.uses)  # fmt: skip
        return known + "²" * (known == "ReLU" and squared)
    heart = {"sigmoid": "SiLU", "erf": "GELU", "tanh": "GELU"}.get(op)
    if heart is None:
        return op
    todo, seen = list(node.outputs), set[Node]()
    ends = _sources(node.inputs[0], inside)[0]
    while todo and len(seen) < NEAR:
        for user in todo.pop().uses:
            if user in seen or user.kind not in THROUGH | {"mul", "add"}:
                continue
            seen.add(user)
            moving = [v for v in user.inputs if not v.fixed and v.number is None]
            if user.kind == "mul" and len(moving) == 2 and any(_sources(v, inside)[0] == ends for v in moving
                                                               if not _sources(v, inside)[1]):  # fmt: skip
                return _scaled(node.inputs[0]) if op == "sigmoid" else heart
            if len(moving) == 1:
                todo.extend(user.outputs)
    return "tanh" if op == "tanh" else ""


def _scaled(value: Value) -> str:
    """What x * sigmoid(c * x) is called: SiLU for c = 1, QuickGELU for 1.702."""
    node = value.producer
    numbers = [v.number for v in node.inputs if v.number is not None] if node is not None and node.kind == "mul" else []
    c = numbers[0] if numbers else 1.0
    return "SiLU" if c == 1 else "QuickGELU" if abs(c - 1.702) < 1e-3 else f"x*sigmoid({c:g}*x)"
