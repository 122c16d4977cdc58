"""A plan: what the passes want changed in one graph. Front ends carry it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from normfuse.graph import Graph, Node, Value
from normfuse.norm import Norm, Refusal, Site
from normfuse.recognise import Recognition

Reason = tuple[str, str]
ALONE = "no neighbour to take in"
"""A reason to leave a norm; where there is one that cannot be taken in, that takes its place."""
"""Why not, as (code, message)."""


@dataclass(frozen=True, slots=True, eq=False)
class Replace:
    """Compute the value of a site by one norm operator, or, `as_written`, by one function of its own nodes.

    `mean` and `rstd` are values besides it that the operator has to give: the mean and the reciprocal of the standard
    deviation, where these are read outside the norm.
    """

    site: Site
    as_written: bool = False
    mean: Value | None = None
    rstd: Value | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.site,)

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (self.site.norm.x,)

    @property
    def outputs(self) -> tuple[Value, ...]:
        return (self.site.value,)

    def parameters(self) -> list[Value]:
        """The values that weight and bias are made of."""
        return self.site.norm.parameters()

    def computes(self) -> dict[Value, list[Value]]:
        """Each value that the replacement gives, with what it is then computed from."""
        norm = self.site.norm
        out = {v: [norm.x] for v in (self.mean, self.rstd) if v is not None}
        return out | {self.site.value: [norm.x, *norm.parameters()]}


@dataclass(frozen=True, slots=True, eq=False)
class Fused:
    """Compute norms and the additions beside them by one operator of the family of `normfuse.ops`.

    | op            | sites        | inputs      | outputs                                   |
    |---------------|--------------|-------------|-------------------------------------------|
    | norm          | y            | x           | y                                         |
    | add_norm      | y            | x, residual | y, s = x + residual                       |
    | norm_add      | n            | x, residual | s = residual + n; n itself is gone        |
    | norm_add_norm | n, y         | x, residual | y = norm(s), s = residual + n; n is gone  |
    | qk_norm       | norms of q, k | q, k       | both                                      |
    """

    op: str
    sites: tuple[Site, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    round_sum: bool = True
    """Of an add_norm: whether its norm reads s; where not, the sum in float32 that s is rounded from."""
    x_bias: Value | None = None
    """Of an add_norm: a constant row of length N that is added to x before the residual is, a linear layer's bias."""

    @property
    def results(self) -> tuple[Value, ...]:
        """The outputs that the model has: an s that it does not round, because nobody reads it, is none of them."""
        return tuple(v for v in self.outputs if v.producer is not None)

    @property
    def view(self) -> Value | None:
        """The view of s that an add_norm's y is the norm of, where it is not of s itself."""
        x = self.sites[0].norm.x
        return x if self.op == "add_norm" and self.round_sum and x is not self.outputs[1] else None

    @property
    def name(self) -> str:
        """The operator's name."""
        name = self.op.replace("norm", self.sites[0].norm.kind) if self.op in ("norm", "add_norm") else self.op
        return name if self.x_bias is None else f"bias_{name}"

    def parameters(self) -> list[Value]:
        """The values that weights and biases are made of."""
        own = [v for site in self.sites for v in site.norm.parameters()]
        return own if self.x_bias is None else [self.x_bias, *own]

    def computes(self) -> dict[Value, list[Value]]:
        """Each value that the operator gives, with what it is then computed from."""
        return {value: [*self.inputs, *self.parameters()] for value in self.outputs}


Edit = Replace | Fused


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a front end can put into its graph.

    `expressible` is its veto on a norm alone; `functions`: it can make a function of nodes; `statistics`: whether its
    operator for a norm also gives the mean and the reciprocal of the standard deviation; `operator`: its veto on a
    fused operator, None where it has none; `leave`: why a norm without a neighbour had better be left as it is, or
    None to replace it, and, if told that it is one of a pair, whether that had better be no pair; `done`: whether a
    norm stands there as the front end would write it.
    """

    expressible: Callable[[Norm, Value], Reason | None]
    functions: bool = False
    statistics: Callable[[Norm], bool] = lambda norm: False
    operator: Callable[[Fused], Reason | None] | None = None
    leave: Callable[[Site, bool], str | None] | None = None
    done: Callable[[Site], bool] = lambda site: False
    foreign: Callable[[Site], bool] = lambda site: False


@dataclass(slots=True, eq=False)
class Plan:
    """Edits to one graph and the refusals met on the way, by site where they belong to one.

    `broken` holds fusions that were tried and failed, by operator's name and first site: a smaller one may still do.
    `left` holds sites that are not worth replacing, with the reason; `apart`, why an operator cannot take a site and
    what stands beside it.
    """

    graph: Graph
    found: Recognition
    replace: list[Replace] = field(default_factory=list)
    fused: list[Fused] = field(default_factory=list)
    remove: list[Node] = field(default_factory=list)
    refused: dict[Site, Refusal] = field(default_factory=dict)
    broken: dict[tuple[str, Site], Refusal] = field(default_factory=dict)
    left: dict[Site, str] = field(default_factory=dict)
    apart: dict[Site, str] = field(default_factory=dict)

    def edits(self) -> list[Edit]:
        """All edits, the wider ones first."""
        return [*self.fused, *self.replace]

    def clear(self) -> None:
        """Drop the edits, to plan again with what is known to fail."""
        self.replace.clear()
        self.fused.clear()
        self.remove.clear()
        self.left.clear()
        self.apart.clear()

    def refuse(self, site: Site, why: Refusal) -> None:
        """Leave a site as it is, and say why."""
        self.refused[site] = why

    def fail(self, edit: Edit, why: Refusal) -> None:
        """An edit is not to be made again: a fusion may fall apart into smaller ones, a single norm stays."""
        if isinstance(edit, Fused):
            self.broken[edit.name, edit.sites[0]] = why
        else:
            self.refuse(edit.site, why)

    def free(self) -> list[Site]:
        """The sites that no edit has taken, nothing has refused, and which are worth replacing."""
        gone = {site for edit in self.edits() for site in edit.sites} | self.refused.keys() | self.left.keys()
        return [site for site in self.found.sites if site not in gone]

    def fuse(self, edit: Fused, can: Abilities) -> bool:
        """Take an edit in, unless it has failed before or the front end cannot make it."""
        key = (edit.name, edit.sites[0])
        if can.operator is None or key in self.broken:
            return False
        why = can.operator(edit)
        if why is not None:
            self.apart.update(dict.fromkeys(edit.sites if edit.op != "norm" else (), why[1]))
            return False
        self.fused.append(edit)
        return True
