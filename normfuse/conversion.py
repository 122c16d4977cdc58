"""What a conversion of LayerNorms into RMSNorms is: what it has to know of a model, the plan, the proof of each norm.

`normfuse.passes.layernorm_to_rmsnorm` makes the plan, the front ends carry it out.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from normfuse.centring import Centre, Channels, Links
from normfuse.facts import ONE
from normfuse.graph import Graph, Node, Value
from normfuse.norm import Expr, Norm, Refusal, Site, region
from normfuse.passes.fold_affine import Contraction
from normfuse.plan import Reason
from normfuse.recognise import Recognition
from normfuse.sites import Chooser
from normfuse.transfer import identity_layout

Reader = tuple[Node, Value] | Site
"""Who asks: a node for one of its results, or a norm."""
Operator = tuple[Value, Centre]


@dataclass(frozen=True, slots=True)
class Means:
    """What a front end knows and can do.

    `channels`: its table of native operators; `span`: (start, end) of a slice along an axis; `uniform`: whether a
    constant is one number all over; `locked`: why a constant cannot be edited, or None; `place`: whether an operator
    can stand behind a value; `blind`: whether a node gives the same for a value and for the centred value; `fits`: the
    front end's veto, (code, message), on a norm as it was found and as its operator has it; `twins`: what constants of
    the same storage have in common; `shared`: who else has a constant, unseen in the graph; `untie`: a constant with
    other readers is copied rather than left, where those that ask can be given a copy (`copied`); `hooks`: an operator
    changes what every reader of the value sees, not only those that asked; `partial`: of the norms that are to be
    converted, and what their operators are, those that cannot be without others, and why.
    """

    channels: Channels
    span: Callable[[Node, Value, int], tuple[int, int] | None]
    uniform: Callable[[Value], bool]
    locked: Callable[[Value], str | None]
    place: Callable[[Value], bool]
    blind: Callable[[Node, Value, Centre], bool]
    fits: Callable[[Site, Site], tuple[str, str] | None]
    twins: Callable[[Value], Hashable] = lambda value: value
    shared: Callable[[Value], str | None] = lambda value: None
    untie: bool = False
    copied: Callable[[Value, Sequence[Node]], bool] = lambda value, readers: True
    hooks: bool = False
    partial: Callable[[Mapping[Site, Site]], Mapping[Site, str]] = lambda norms: {}


class Groups:
    """Things that belong together, and those that they belong to."""

    def __init__(self) -> None:
        self.leader: dict[object, object] = {}

    def of(self, a: object) -> object:
        """What stands for the group of a thing."""
        while self.leader.setdefault(a, a) is not a:
            self.leader[a] = a = self.leader[self.leader[a]]
        return a

    def join(self, a: object, b: object) -> None:
        """Make one group of two."""
        self.leader[self.of(a)] = self.of(b)


@dataclass(slots=True, eq=False)
class Conversion:
    """What is to be done: norms to convert, constants to edit, operators to put and who reads them.

    `scaled` are multiplications by a constant per channel whose factor moves into the constants. `copies` are edited
    constants with another reader, which keeps the old one. `uniform` are the constants whose being one number the plan
    rests on. `kept` says of the other LayerNorms why. `inner` has the operator that a norm stands in, where views are
    around that. `folds` are biases and weights of norms that go into the linear layers behind, `folded` the norms after
    that, `zero` the biases that are dropped because they are zero.
    """

    sites: list[Site] = field(default_factory=list)
    edits: dict[Value, Centre] = field(default_factory=dict)
    operators: dict[Operator, list[Reader]] = field(default_factory=dict)
    scaled: list[Node] = field(default_factory=list)
    copies: dict[Value, list[Node]] = field(default_factory=dict)
    uniform: list[Value] = field(default_factory=list)
    kept: dict[Site, Refusal] = field(default_factory=dict)
    inner: dict[Site, Site] = field(default_factory=dict)
    values: dict[Value, Centre] = field(default_factory=dict)
    seeds: dict[Value, str] = field(default_factory=dict)
    zero: list[Value] = field(default_factory=list)
    folds: list[tuple[str, Expr, list[Contraction]]] = field(default_factory=list)
    folded: dict[Site, Site] = field(default_factory=dict)
    proof: dict[Site, Proof] = field(default_factory=dict)

    def keep(self, site: Site, code: str, why: str) -> None:
        """Leave a LayerNorm as it is, and say why."""
        self.kept[site] = Refusal(code, site.label, why)

    def changed(self) -> list[Site]:
        """The norms that become others."""
        return list(dict.fromkeys([*self.sites, *self.folded]))

    def factor(self, node: Node) -> Value:
        """The factor of a multiplication that is taken out."""
        return next(v for v in node.inputs if v.fixed and (
            v not in self.values or (v in self.copies and node not in self.copies[v])))

    def unscaled(self, value: Value) -> Value:
        """What a value is once the multiplications are taken out."""
        while (node := value.producer) is not None and node in self.scaled:
            value = next(v for v in node.inputs if v is not self.factor(node))
        return value

    def witnesses(self) -> list[Value]:
        """Values inside the graph that have to stay as they were: what layers give into which a bias or weight went.
        The outputs may hide them: a softmax does not see the bias of the keys."""
        found = dict.fromkeys(one.out for _, _, linears in self.folds for one in linears)
        return [v for v in found if v.native is not None and v not in self.values]

    def numbers(self) -> list[Value]:
        """The tensors that a norm takes for one number: a product with a matrix of ones is a sum, of zeros zero."""
        nodes = (node for site in self.changed() for node in region(site.value, site.norm))
        read = dict.fromkeys(v for node in nodes for v in node.inputs)
        held = (v for v in read if v.number is not None and v.leaf and v.fixed and v.native is not None)
        return [v for v in held if any(d != 1 for d in v.shape or ())]

    def constants(self) -> list[Value]:
        """The constants that are edited, or that an edit reads."""
        found = [*self.edits, *(g for want in self.edits.values() for g in want.scales), *self.zero, *self.uniform]
        for _, expr, linears in self.folds:
            found += [v for _, factors in expr for v, _ in factors]
            found += [v for one in linears for v in (one.weight, one.bias) if v is not None]
        return list(dict.fromkeys(found))


@dataclass(slots=True)
class Proof:
    """Why one norm may be converted, in lines for people."""

    derivation: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    edits: list[str] = field(default_factory=list)
    operators: list[str] = field(default_factory=list)
    depends: list[str] = field(default_factory=list)
    uniform: list[Value] = field(default_factory=list)


def rms(norm: Norm, x: Value | None = None) -> Norm:
    """The RMSNorm of a centred input that a LayerNorm is."""
    return replace(norm, kind="rms_norm", x=x or norm.x)


def operator_of(site: Site) -> Site:
    """The norm as its operator has it, without the views around: its own input, axes and result; else the site."""
    if not site.is_op:
        return site
    nodes = region(site.value, site.norm)
    core = next((n for n in nodes if n.kind == site.norm.kind), None)
    if core is None:
        return site
    stages = [n for n in nodes if n.native is core.native]
    first, last = core, stages[0]
    while (ahead := first.inputs[0].producer) is not None and ahead in stages:
        first = ahead
    norm = replace(site.norm, x=first.inputs[0], axes=core.attrs["axes"])
    return replace(site, value=last.outputs[0], norm=norm) if norm.x is not site.norm.x else site


def parts_of(found: Recognition, site: Site) -> list[Site]:
    """The LayerNorms that the last node of one makes it of: that which it scales, or those of one x that it adds."""
    nodes = [node for node in reversed(region(site.value, site.norm)) if site.value not in node.outputs]
    key, operands = site.fact.root.key(), {v.index: v for node in nodes for v in node.inputs}
    values = [site.norm.x, *(v for node in nodes for v in node.outputs)]
    facts = {v.index: {key: found.facts[v.index][key]} for v in values if key in found.facts.get(v.index, ())}
    chosen = Chooser(Graph(nodes=nodes), facts, operands, set(), {}).sites()
    return [replace(s, placement=site.placement, attends=site.attends) for s in chosen if s.norm.kind == site.norm.kind]


class Candidates:
    """The LayerNorms that a conversion may take, and what goes with their nodes when they are made anew."""

    def __init__(self, found: Recognition, can: Means, alive: set[Node]) -> None:
        self.found, self.can, self.alive = found, can, alive
        self.out = Conversion()
        self.sites: list[Site] = []
        self.cones: dict[tuple[Node, Value], list[int]] = {}  # nodes that cannot tell along which axis x is centred
        self.inside: dict[Value, list[Site]] = {}
        for site in found.sites:
            if site.norm.kind != "layer_norm":
                continue
            if (why := self._unfit(site)) is not None:
                self.out.keep(site, *why)
                continue
            self.sites.append(site)
            inner = self.out.inner.get(site, site)
            for v in (v for n in region(inner.value, inner.norm) for v in n.outputs if v is not inner.value):
                self.inside.setdefault(v, []).append(site)

    def _unfit(self, site: Site) -> Reason | None:
        norm = site.norm
        if site.value.producer not in self.alive:
            return "NF301", "no output of the graph depends on it"
        if len(norm.axes) != 1:
            return "NF301", f"it normalises over {len(norm.axes)} axes at once"
        if norm.size is None:
            return "NF301", "the size of its axis is not known"
        self._cone(site)
        inner = operator_of(site)
        if inner is not site:
            self.out.inner[site] = inner
            self._cone(inner)
        if inner.norm.x.native is None:
            return "NF301", "its input is a value inside another operator"
        return self.can.fits(site, inner)

    def _cone(self, site: Site) -> None:
        """The nodes of a norm that nothing outside of it reads cannot tell whether its input is centred, if they read
        the input itself, or one copy or cast of it that has other readers."""
        nodes = region(site.value, site.norm)
        inside = set(nodes)
        while True:
            leaks = {n for n in inside for v in n.outputs if v is not site.value and
                     (v.kept or any(u not in inside and u in self.alive for u in v.uses))}  # fmt: skip
            if not leaks:
                break
            inside -= leaks
        x = site.norm.x
        outside = set(nodes) - inside
        read = {v for n in inside for v in n.inputs if v is x or v.producer in outside}
        for v in read if len(read) == 1 and all(self._copies(v, site) for v in read) else {x}:
            for node in v.uses:
                if node in inside:
                    self.cones.setdefault((node, v), []).append(site.norm.axes[0])

    def _copies(self, value: Value, site: Site) -> bool:
        """Whether a value of a norm is its input, in another type at most."""
        root = site.fact.root
        fact = self.found.facts.get(value.index, {}).get(root.key())
        plain = fact is not None and fact.alpha == {ONE: 1.0} and not fact.beta
        return plain and fact is not None and fact.layout == identity_layout(root.value)


def prove(plan: Conversion, site: Site, told: dict[Value, Site], links: Callable[[Value, dict[Value, None]], Links],
          alive: set[Node]) -> Proof:  # fmt: skip
    """The derivation of one norm, down to constants or to what an earlier norm has shown; `links` are the operands that
    a value needs centred, and notes the constants that have to be one number for that."""
    proof, seen = Proof(), set[Value]()
    todo = [plan.inner.get(site, site).norm.x]
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        if value in plan.seeds:
            proof.operators.append(f"behind {value.name}: {plan.seeds[value]}")
            continue
        if value not in plan.values:
            proof.derivation.append(f"{value.name} has mean zero already")
            continue
        if value in told:
            proof.derivation.append(f"{value.name}: as shown for {told[value].label}")
            continue
        told[value] = site
        node, own = value.producer, dict[Value, None]()
        if node is None:
            scales = "".join(f"{g.name} * " for g in plan.values[value].scales)
            proof.edits.append(f"{scales}{value.name}: mean taken away along axis {plan.values[value].axis}"
                               + _blocks(plan.values[value], value))  # fmt: skip
            continue
        operands = links(value, own)
        proof.uniform += own
        proof.depends += [f"{v.name} is one number all over" for v in own]
        names = ", ".join(v.name or "a value inside" for v, _ in operands) or "nothing"
        if value.native is not None:
            proof.derivation.append(f"{value.name} = {node.op}: needs {names}")
        readers = [u.name or u.op for u in dict.fromkeys(value.uses) if u in alive]
        if value.native is not None and readers:
            proof.readers.append(f"{value.name}: {', '.join(readers)}")
        todo += [v for v, _ in reversed(operands)]
    return proof


def _blocks(want: Centre, value: Value) -> str:
    n, only = len(want.blocks), want.only
    whole = replace(want, only=None).whole(value) or (n == 1 and want.scales)
    part = "" if only is None else f", at {', '.join(map(str, only[1]))} of axis {only[0]}"
    return part if whole else f"{part}, in {count(n, 'block')} of {want.blocks[0][1]}"


def count(n: int | list[Value], what: str) -> str:
    n = n if isinstance(n, int) else len(n)
    return f"{n} {what}{'s' if n != 1 else ''}"
