"""The recipe of a model as data: which norms its layers have, where, and which layers differ.

Made from the graph alone (`normfuse.blocks`); the terminal, JSON and the pages of `normfuse.html` show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from normfuse.blocks import Layer, find
from normfuse.facts import number
from normfuse.graph import Graph, Value
from normfuse.norm import Expr, Site
from normfuse.placement import per_head

if TYPE_CHECKING:
    from normfuse.report import NormRecord

OPERATORS = {"rms_norm": "RMSNorm", "layer_norm": "LayerNorm"}
KINDS = {"attention": "attention", "cross_attention": "cross-attention", "feed_forward": "feed-forward",
         "recurrent": "recurrent", "convolution": "convolution", "linear": "linear"}  # fmt: skip


@dataclass(slots=True)
class NormUse:
    """Norms that are alike in all but their numbers and have the same place in their layers.

    `place` is the placement, `part` the kind of the part it belongs to ("" outside of the layers), `of` what it is
    the norm of inside attention ("q", "k", "k+v"), `scope` "per head" or "full width" for those; `weight` is "w",
    "1 + w", "none" or what else the weight is made of. `layers` count from 0 in their stack, of `depth`.
    """

    operator: str
    place: str
    part: str
    of: str
    scope: str
    width: int | None
    eps: float
    weight: str
    bias: bool
    cast: str
    form: str
    depth: int = 0
    layers: list[int] = field(default_factory=list)
    count: int = 0
    first: str = ""

    @property
    def where(self) -> str:
        """Its place in words, such as ``q, per head``."""
        if self.place == "qk":
            return ", ".join(filter(None, (self.of or "q or k", self.scope)))
        if self.place == "latent":
            return f"latent of {self.of}" if self.of else "latent"
        place = "other" if self.part and self.place in ("embedding", "final") else self.place
        return PLACES.get(place, place)

    @property
    def which(self) -> str:
        """Its layers in words."""
        return layers_text(self.layers, self.depth) if self.layers else "outside the layers"


PLACES = {
    "pre": "before", "sandwich_pre": "before", "post": "after, inside the residual",
    "sandwich_post": "after, inside the residual", "post_residual": "after the residual", "gated": "gated",
    "embedding": "embedding", "final": "final", "other": "inside",
}  # fmt: skip


@dataclass(slots=True)
class CardPart:
    """A part of a branch with its norms, as indices of `Card.norms`."""

    kind: str
    details: list[str]
    before: list[int]
    inside: list[int]
    after: list[int]


@dataclass(slots=True)
class CardBranch:
    """What one addition puts onto the residual stream, and the norms on the stream behind it."""

    parts: list[CardPart]
    stream: list[int]


@dataclass(slots=True)
class Block:
    """Layers that are alike."""

    layers: list[int]
    branches: list[CardBranch]


@dataclass(slots=True)
class Stack:
    """A stack of layers, the most common block first."""

    depth: int
    blocks: list[Block]


@dataclass(slots=True)
class Card:
    """How a model normalises. `outside` are the norms that stand in no layer, as indices of `norms`."""

    stacks: list[Stack] = field(default_factory=list)
    norms: list[NormUse] = field(default_factory=list)
    outside: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """A plain dict, for JSON."""
        return asdict(self)

    def formula(self, branch: CardBranch) -> str:
        """A branch as mathematics, such as ``x + RMSNorm(attention(RMSNorm(x)))``."""
        terms = ["x"]
        for part in branch.parts:
            terms.append(self._around(part.after, f"{KINDS[part.kind]}({self._around(part.before, 'x')})"))
        return self._around(branch.stream, " + ".join(terms))

    def differences(self, block: Block, common: Block) -> list[str]:
        """In what the norms of a block differ from those in the same places of another."""
        out: list[str] = []
        here, there = self._places(block), self._places(common)
        for place, i in here.items():
            j = there.get(place, i)
            now, was = self.norms[i], self.norms[j]
            pairs = [(text, getattr(now, key), getattr(was, key)) for key, text in DIFFERING.items()]
            words = [f"{text} {_word(a)} instead of {_word(b)}" for text, a, b in pairs if a != b]
            if words:
                out.append(f"{now.operator} {now.where}: " + ", ".join(words))
        return out

    def _places(self, block: Block) -> dict[tuple[object, ...], int]:
        out: dict[tuple[object, ...], int] = {}
        for b, branch in enumerate(block.branches):
            lists = [((p.kind, name), getattr(p, name)) for p in branch.parts for name in ("before", "inside", "after")]
            for where, norms in [*lists, (("", "stream"), branch.stream)]:
                for k, i in enumerate(norms):
                    out[b, *where, self.norms[i].of or k] = i
        return out

    def _around(self, norms: Sequence[int], inner: str) -> str:
        for i in norms:
            inner = f"{self.norms[i].operator}({inner})"
        return inner

    def remarks(self, branch: CardBranch) -> list[str]:
        """What the formula of a branch does not say: norms inside, activation, experts."""
        out: list[str] = []
        for part in branch.parts:
            alike: dict[tuple[str, str], list[str]] = {}
            for i in part.inside:
                use = self.norms[i]
                text = {"qk": use.scope, "latent": "latent"}.get(use.place, use.where)
                alike.setdefault((use.operator, text), []).append(use.of)
            for (operator, text), names in alike.items():
                of = list(dict.fromkeys(filter(None, names)))
                out.append(f"{operator} " + (f"of {' and '.join(of)}, {text}" if of else text))
            out += part.details
        return out


DIFFERING = {"eps": "eps", "width": "width", "weight": "weight", "bias": "bias", "scope": "over", "cast": "computed in",
             "form": "form"}  # fmt: skip


def _word(value: object) -> str:
    return number(value) if isinstance(value, float) else "none" if value in (None, "") else str(value)


def layers_text(layers: Sequence[int], depth: int) -> str:
    """Layers in words: ``all 12 layers``, ``layers 0-11 but 5 and 11``."""
    if len(layers) == depth:
        return "the only layer" if depth == 1 else f"all {depth} layers"
    known, end = set(layers), layers[-1]
    missing = [i for i in range(layers[0], end + 1) if i not in known]
    if missing and end == depth - 2:  # counted up to the end, the exceptions read better
        missing.append(depth - 1)
        end = depth - 1
    few = missing and 3 * len(missing) <= len(layers)
    words = f"{layers[0]}-{end} but {_runs(missing)}" if few else _runs(layers)
    return ("layer " if len(layers) == 1 else "layers ") + words


def _runs(layers: Sequence[int]) -> str:
    """Numbers with ranges and equal steps: ``0-4, 6 and 8``, ``5-59 in steps of 6``."""
    steps = {b - a for a, b in pairwise(layers)}
    if len(layers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{layers[0]}-{layers[-1]} in steps of {steps.pop()}"
    runs: list[list[int]] = []
    for i in layers:
        if runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    words = [str(r[0]) if len(r) == 1 else f"{r[0]} and {r[1]}" if len(r) == 2 and len(runs) == 1
             else f"{r[0]}-{r[-1]}" for r in runs]  # fmt: skip
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


# -- from the graph ------------------------------------------------------------------------------------------------


def card_of(graph: Graph, sites: Sequence[Site], records: dict[Site, NormRecord]) -> Card:
    """The card of a model whose main graph is given; `records` has all norms, those of other graphs too."""
    return _Maker(records).run(find(graph, sites))


Key = tuple[object, ...]


class _Maker:
    def __init__(self, records: dict[Site, NormRecord]) -> None:
        self.records = records
        self.card = Card()
        self.known: dict[Key, int] = {}
        self.done: dict[tuple[int, Site], int] = {}

    def run(self, stacks: list[list[Layer]]) -> Card:
        for i, layers in enumerate(stacks):
            self._stack(i, layers)
        held = {site for _, site in self.done}
        for site, record in self.records.items():
            if site not in held:
                index = self._use(site, record, ("outside",), "", "", None, 0)
                if index not in self.card.outside:
                    self.card.outside.append(index)
        return self.card

    def _stack(self, stack: int, layers: list[Layer]) -> None:
        blocks: dict[str, Block] = {}
        depth = len(layers)
        for n, layer in enumerate(layers):
            branches: list[CardBranch] = []
            for b, branch in enumerate(layer):
                parts: list[CardPart] = []
                for part in sorted(branch.parts, key=lambda p: p.kind):
                    where = (stack, b, part.kind)

                    def use(site: Site, name: str, of: str = "", where: Key = where, kind: str = part.kind,
                            layer: int = n) -> int:  # fmt: skip
                        return self._use(site, self.records[site], (*where, name, of), kind, of, layer, depth)

                    parts.append(CardPart(
                        part.kind, list(part.details), [use(s, "before") for s in part.before],
                        [use(s, "inside", of) for of, s in part.inside], [use(s, "after") for s in part.after],
                    ))  # fmt: skip
                on = [self._use(s, self.records[s], (stack, b, "stream"), branch.parts[-1].kind, "", n, depth)
                      for s in branch.stream]  # fmt: skip
                branches.append(CardBranch(parts, on))
            blocks.setdefault(repr(branches), Block([], branches)).layers.append(n)
        ordered = sorted(blocks.values(), key=lambda block: (-len(block.layers), block.layers))
        self.card.stacks.append(Stack(depth, ordered))

    def _use(self, site: Site, record: NormRecord, where: Key, part: str, of: str, layer: int | None,
             depth: int) -> int:  # fmt: skip
        """The index of the use that a norm belongs to."""
        scope = ""
        if record.placement == "qk":
            scope = "per head" if per_head(site) else "full width"
        made = NormUse(OPERATORS[record.kind], record.placement, part, of, scope, record.size, record.eps,
                       affine(site.norm.weight), site.norm.bias is not None, record.cast, record.form, depth,
                       first=record.name)  # fmt: skip
        key = (where, made.place, scope, made.operator, made.width, made.eps, made.weight, made.bias, made.cast,
               made.form)  # fmt: skip
        index = self.known.setdefault(key, len(self.card.norms))
        if index == len(self.card.norms):
            self.card.norms.append(made)
        use = self.card.norms[index]
        if (index, site) not in self.done:
            use.count += 1
        self.done[index, site] = index
        if layer is not None and layer not in use.layers[-1:]:
            use.layers.append(layer)
        return index


def affine(expr: Expr | None) -> str:
    """What a weight is made of: "none", "w", "1 + w", "w1*w2"; a sum that the model computes ahead is looked into."""
    if expr is None:
        return "none"
    values = list(dict.fromkeys(v for _, factors in expr for v, _ in factors))
    names = {v: "w" if len(values) == 1 else f"w{i + 1}" for i, v in enumerate(values)}
    names = {v: _inner(v, name) for v, name in names.items()}
    terms = []
    for c, factors in sorted(expr, key=lambda term: len(term[1])):
        single = c == 1 and len(expr) == len(factors) == 1
        parts = [(names[v] if single or " " not in names[v] else f"({names[v]})") + ("" if e == 1 else f"^{e:g}")
                 for v, e in factors]  # fmt: skip
        terms.append("*".join(([] if c == 1 and parts else [number(c)]) + parts))
    return " + ".join(terms)


def _inner(value: Value, name: str) -> str:
    """The name of a parameter, or the sum of a number and one that it is."""
    for _ in range(8):
        node = value.producer
        if node is not None and node.kind in ("cast", "identity", "reshape", "expand", "unsqueeze", "squeeze"):
            value = node.inputs[0]
            continue
        if node is not None and node.kind == "add":
            numbers = [v.number for v in node.inputs if v.number is not None]
            if len(numbers) == 1:
                return f"{number(numbers[0])} + {name}"
        break
    return name
