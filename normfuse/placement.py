"""Where each norm stands in its block, read off the graph: never off a name.

The residual stream is found first: the values that are an operand of an addition of two tensors of the same shape
whose result depends on the other operand's branch. Then each norm is placed by what it reads and who reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from normfuse.graph import Graph, Node, Shape, Value
from normfuse.norm import Site, region

THROUGH = frozenset("cast identity quantize reshape unsqueeze squeeze transpose expand".split())
SAME = frozenset("cast identity quantize reshape transpose".split())
MIXING = frozenset("linear recurrent attention matmul".split())
SHORT_WALK, LONG_WALK = 24, 400


def place(graph: Graph, sites: Sequence[Site]) -> None:
    """Set the placement of every site."""
    Placer(graph, sites).run()


class Placer:
    def __init__(self, graph: Graph, sites: Sequence[Site]) -> None:
        self.sites = sites
        self.normed = {site.value: site for site in sites}
        self.inside = _inside(graph, sites)
        self.roots: dict[Value, list[Site]] = {}
        for site in sites:
            self.roots.setdefault(self.base(site.norm.x), []).append(site)
        self.adds = [node for node in graph.nodes if self._residual(node)]
        self.stream: dict[Value, list[Node]] = {}
        for node in self.adds:
            for operand in node.inputs:
                self.stream.setdefault(self.base(operand), []).append(node)
        self.fed: set[Value] = set()  # values that some norm is upstream of
        for node in graph.nodes:
            if any(v in self.fed or v in self.normed for v in node.inputs):
                self.fed.update(node.outputs)

    def base(self, value: Value) -> Value:
        """The value behind casts, quantizations, copies, reshapes and transposes."""
        for _ in range(SHORT_WALK):
            node = value.producer
            if value in self.normed or node is None or node.kind not in SAME:
                break
            value = node.inputs[0]
        return value

    def _residual(self, node: Node) -> bool:
        if node.kind != "add" or node in self.inside:
            return False
        a, b = node.inputs
        return not any(v.number is not None or v.fixed for v in (a, b)) and _alike(a.shape, b.shape)

    def run(self) -> None:
        for site in self.sites:
            site.placement = self._place(site)
        pre = {self.base(s.norm.x) for s in self.sites if s.placement in ("pre", "sandwich_pre", "final")}
        for site in self.sites:
            if site.placement == "post" and any(r in pre and not self._only_final(r) for r in self._others(site)):
                site.placement = "sandwich_post"
        for site in self.sites:
            if site.placement == "pre" and self._closes_with_norm(site):
                site.placement = "sandwich_pre"

    def _only_final(self, value: Value) -> bool:
        return all(s.placement == "final" for s in self.roots.get(value, ()))

    def _others(self, site: Site) -> Iterator[Value]:
        """The streams that the output of a post norm is added to."""
        for node in self._adds_of(site.value):
            for operand in node.inputs:
                if self.base(operand) is not site.value:
                    yield self.base(operand)

    def _adds_of(self, value: Value) -> list[Node]:
        """Residual additions that read a value, casts and reshapes aside."""
        out = list(self.stream.get(value, ()))
        out += [node for node, _ in _forward(value, THROUGH, SHORT_WALK, self.inside) if node in self.adds]
        return [node for i, node in enumerate(out) if node not in out[:i]]

    def _closes_with_norm(self, site: Site) -> bool:
        """The branch that starts at this pre norm is added back through a norm."""
        for node in self.stream.get(self.base(site.norm.x), ()):
            for operand in node.inputs:
                other = self.normed.get(self.base(operand))
                if other is not None and other.placement == "sandwich_post":
                    return True
        return False

    def _place(self, site: Site) -> str:
        x, y = self.base(site.norm.x), site.value
        reads_stream = x in self.stream or x.producer in self.adds
        adds = self._adds_of(y)
        uses = [node for node in _turned(y).uses if node not in self.inside]
        site.attends = self._attends(y)
        if site.attends is not None:
            return "qk"
        if adds and len(adds) >= len([n for n in uses if n.kind not in THROUGH]) and not reads_stream:
            if self._branch(x) and not all(_made_of(v, y) for node in adds for v in node.inputs):
                return "post"  # else it begins the stream that it is added to
        if adds:
            if not self._after_norm(x) and not self._first_sum(x):
                return "embedding"
            if x.producer in self.adds:
                return "post_residual"
        if self._gated(x, y):
            return "gated"
        if reads_stream:
            if self.stream.get(x):
                return "pre"
            node = x.producer
            assert node is not None
            if any(self.base(v) in self.normed and self.normed[self.base(v)].placement in
                   ("post_residual", "embedding") for v in node.inputs):  # fmt: skip
                return "post_residual"
            return "final"
        if self._rows_of_the_end(x):
            return "final"
        if self._branch(x) and self._feeds_linear(y):
            return "latent"
        return "final" if self._after_norm(x) and not self._feeds_linear(y) else "other"

    def _rows_of_the_end(self, x: Value) -> bool:
        """x is some rows of what the last addition gives: of an image without its text, of the first token."""
        for _ in range(SHORT_WALK):
            node = x.producer
            if node is None or node.kind not in ("slice", "gather"):
                break
            whole = node.inputs[0]
            if not x.shape or not whole.shape or x.shape[-1] != whole.shape[-1]:
                return False
            x = self.base(whole)
        return x.producer in self.adds and x not in self.stream

    def _after_norm(self, x: Value) -> bool:
        return x in self.fed or x in self.normed

    def _first_sum(self, x: Value) -> bool:
        """x is the sum that ends the first branch of a stream, and not a sum of embeddings."""
        node = x.producer
        return node in self.adds and any(self._branch(v, added=True) for v in node.inputs)

    def _branch(self, x: Value, added: bool = False) -> bool:
        """x comes out of a linear layer (or a branch that ends in one), not off the stream; or is `added` to it."""
        value = x
        for _ in range(SHORT_WALK):
            node = value.producer
            if node is None or (value in self.stream and not (added and value is self.base(x))):
                return False
            if node.kind in MIXING:
                return True
            if node.kind == "add":  # the bias of a linear layer
                moving = [v for v in node.inputs if not v.fixed and v.number is None]
                if len(moving) == 1:
                    value = moving[0]
                    continue
            if node.kind not in THROUGH | {"slice", "mul", "div", "opaque", "where", "gather", "concat", "sum"}:
                return False
            moving = [v for v in node.inputs if not v.fixed and v.number is None]
            if not moving:
                return False
            value = moving[0]
        return False

    def _feeds_linear(self, y: Value) -> bool:
        through = THROUGH | {"mul", "add", "slice"}
        readers = _forward(y, through, SHORT_WALK, self.inside)
        return any(node.kind in ("linear", "recurrent") or _projects(node) for node, _ in readers)

    def _attends(self, y: Value) -> Node | None:
        """The attention product that y goes into before it goes through any linear layer.

        In linear attention an activation or a relu, a maximum, stands in between.
        """
        through = THROUGH | set("add sub mul div neg slice concat where gather opaque activation max".split())
        for node, _ in _forward(y, through, LONG_WALK, self.inside):
            if node.kind == "attention" and not _projects(node):
                return node
            if node.kind == "matmul" and not any(weight(v) for v in node.inputs):
                return node
        return None

    def _gated(self, x: Value, y: Value) -> bool:
        """The norm's input or output is multiplied by an activation."""
        products = [node for node, _ in _forward(y, THROUGH, SHORT_WALK, self.inside) if node.kind == "mul"]
        if x.producer is not None and x.producer.kind == "mul":
            products.append(x.producer)
        return any(_activated(v) for node in products for v in node.inputs)


def _made_of(value: Value, y: Value) -> bool:
    """Whether a value is y, or computed from it; so, too, where that takes too long to tell."""
    todo, seen = [value], set[Value]()
    while todo and len(seen) < LONG_WALK:
        v = todo.pop()
        if v is y:
            return True
        if v.index > y.index and v.producer is not None and v not in seen:
            seen.add(v)
            todo += v.producer.inputs
    return bool(todo)


def per_head(site: Site) -> bool:
    """Whether the norm of a query or key runs over one head, and not over all of them at once.

    A head is as wide as what the product of scores sums over; where an operator keeps that to itself, a tensor with an
    axis of heads has rank 4, or is what a reshape has made of wider rows.
    """
    product, norm = site.attends, site.norm
    assert norm.x.shape is not None
    shape = product.inputs[0].shape if product is not None and product.kind != "attention" else None
    width = shape[-1] if shape else None
    if norm.size is None:
        return len(norm.x.shape) > 3
    if isinstance(width, int):
        return norm.size <= width
    made = norm.x.producer
    while made is not None and made.kind in ("cast", "identity"):
        made = made.inputs[0].producer
    rows = made.inputs[0].shape if made is not None and made.kind == "reshape" else None
    wider = rows and isinstance(rows[-1], int) and rows[-1] > norm.size
    return len(norm.x.shape) > 3 or bool(wider)


def _projects(node: Node) -> bool:
    """Whether an operator of attention has the linear layer of query, key and value in it, as one of ONNX Runtime's
    and one of torch's have."""
    if node.kind != "attention" or len(node.inputs) < 2:
        return False
    if node.attrs.get("projects"):
        return True
    joined = node.inputs[1].producer
    return all(map(weight, joined.inputs if joined is not None and joined.kind == "concat" else node.inputs[1:2]))


def weight(value: Value) -> bool:
    """A constant, or picked out of one: the matrices of the experts that a router chose."""
    for _ in range(SHORT_WALK):
        if value.fixed or value.number is not None:
            return True
        node = value.producer
        if node is not None and node.kind == "concat":
            return all(v.fixed for v in node.inputs)
        if node is None or node.kind not in THROUGH | {"gather", "slice"}:
            return False
        value = node.inputs[0]
    return False


def _alike(a: Shape | None, b: Shape | None) -> bool:
    """Whether two shapes of rows may be the same: inference has a name of its own for each size it does not know."""
    if a is None or b is None or not len(a) == len(b) > 1 or a[-1] != b[-1]:
        return False
    return all(p == q or (1 not in (p, q) and {type(p), type(q)} != {int}) for p, q in zip(a, b, strict=True))


def _activated(value: Value) -> bool:
    """silu(z) or an activation itself, casts and reshapes aside."""
    for _ in range(6):
        node = value.producer
        if node is None:
            return False
        if node.kind == "activation":
            return True
        if node.kind == "mul":
            return any(v.producer is not None and v.producer.kind == "activation" for v in node.inputs)
        if node.kind not in THROUGH:
            return False
        value = node.inputs[0]
    return False


def _forward(value: Value, through: frozenset[str] | set[str], limit: int,
             inside: set[Node]) -> Iterator[tuple[Node, Value]]:  # fmt: skip
    """Readers of a value that are not `inside` a norm, walking on through the given kinds; each with what it reads."""
    todo = [value]
    seen: set[Node] = set()
    while todo and len(seen) < limit:
        v = todo.pop(0)
        for node in v.uses:
            if node in seen or node in inside:
                continue
            seen.add(node)
            yield node, v
            if node.kind in through:  # of what is quantized the first result alone, not its scale
                todo.extend(node.outputs[:1] if node.kind == "quantize" else node.outputs)


def _turned(value: Value) -> Value:
    """What a value is transposed to, where nothing else reads it."""
    while len(value.uses) == 1 and value.uses[0].kind == "transpose" and not value.kept:
        value = value.uses[0].outputs[0]
    return value


def _inside(graph: Graph, sites: Sequence[Site]) -> set[Node]:
    """The nodes that are left without a reader once each norm is one operator."""
    norms = {site.value for site in sites}
    regions = {node for site in sites for node in region(site.value, site.norm)}
    inside: set[Node] = set()
    for node in reversed(graph.nodes):
        unread = all(not v.kept and all(user in inside for user in v.uses) for v in node.outputs)
        if node in regions and (unread or any(v in norms for v in node.outputs)):
            inside.add(node)
    return inside


def recipe(sites: Sequence[Site]) -> str:
    """One line on how a model normalises, such as ``RMSNorm, pre-norm, QK-norm per head``."""
    if not sites:
        return "no norms"
    kinds = {"rms_norm": "RMSNorm", "layer_norm": "LayerNorm"}
    count = {k: sum(s.norm.kind == k for s in sites) for k in kinds}
    parts = [" and ".join(kinds[k] for k in sorted(kinds, key=lambda k: -count[k]) if count[k])]
    places = {s.placement for s in sites}
    if places & {"sandwich_pre", "sandwich_post"}:
        parts.append("sandwich")
    elif "pre" in places:
        parts.append("pre-norm")
    if "post" in places:
        parts.append("post-norm inside the residual")
    if "post_residual" in places:
        parts.append("post-norm after the residual")
    if "qk" in places:
        heads = {per_head(s) for s in sites if s.placement == "qk"}
        parts.append("QK-norm " + ("per head" if all(heads) else "over the full width"))
    for place_, text in (("latent", "latent norms"), ("gated", "gated norms"), ("embedding", "embedding norm")):
        if place_ in places:
            parts.append(text)
    return ", ".join(parts)


