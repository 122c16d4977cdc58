"""LayerNorm to RMSNorm: what is done to constants, and the certificate of each norm."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from normfuse.centring import Centre
from normfuse.conversion import Conversion, Proof
from normfuse.graph import Node, Value
from normfuse.norm import Expr, Norm, Site, end_of, region
from normfuse.ort_values import Array
from normfuse.passes.fold_affine import Contraction
from normfuse.records import record_of
from normfuse.report import NormRecord, RefusalRecord, Report

if TYPE_CHECKING:
    from normfuse.calibrate import Layer

LIMIT = 1e-12
"""How far the re-randomised models may differ in float64, relative to the largest element of an output."""
SEEN = 1e-6
"""How far they have to differ when the edits of constants are left out, or else the outputs hide the norms: a softmax
that random weights have driven to 0 and 1."""


Path = tuple[str, ...]
Get = Callable[[str], Array]
"""Gives a constant of the original model by name, in float64."""


class Edits:
    """What becomes of a model's constants, each as a function of the original's: of its own weights it gives the new
    ones, of random weights what the certificate needs. All in float64, to be rounded once."""

    def __init__(self) -> None:
        self.made: dict[str, Callable[[Get], Array]] = {}
        self.copies: dict[str, str] = {}
        """New constant -> the one that it is an edited copy of."""

    def get(self, name: str, give: Get) -> Array:
        """A constant of the result."""
        made = self.made.get(name)
        return give(name) if made is None else made(give)

    def _set(self, name: str, source: str, edit: Callable[[Array, Get], Array]) -> None:
        """Put an edit behind those that a constant has already."""
        before = self.made.get(source if name not in self.made else name)
        self.made[name] = lambda give: edit(give(source) if before is None else before(give), give)
        if name != source:
            self.copies[name] = source

    def centre(self, name: str, want: Centre, scales: Sequence[str], source: str = "") -> None:
        """``P (g * w)`` along an axis."""
        self._set(name, source or name, lambda w, give: apply(want, w, [give(g) for g in scales]))

    def add_product(self, bias: str, weight: str, beta: Callable[[Get], Array], contraction: Contraction) -> None:
        """``b + W beta``: the bias of a norm in that of the linear layer behind it."""
        now = self.made.get(weight)  # as the weight is by now, before it is scaled

        def add(b: Array, give: Get) -> Array:
            w = give(weight) if now is None else now(give)
            return np.asarray(b + contraction.product(w, beta(give)).reshape(b.shape))

        self._set(bias, bias, add)

    def scale(self, weight: str, gamma: Callable[[Get], Array], contraction: Contraction) -> None:
        """``W diag(gamma)``: the weight of a norm in that of the linear layer behind it."""
        self._set(weight, weight, lambda w, give: contraction.scaled(w, gamma(give)))


@dataclass(slots=True)
class Certificate:
    """The check of a whole conversion.

    `gap`: largest difference of the outputs of the two models in float64 with all their constants replaced by random
    ones whose means are not zero, relative to the largest element. `before`, `after`: distances to float64 (norm of
    the difference over the norm) of the original and the result with their own weights in their own types; None where
    they were not measured. `any_of`: the operators that could not be computed, for which any function stood.
    """

    ok: bool
    gap: float | None = None
    constants: int = 0
    before: float | None = None
    after: float | None = None
    message: str = ""
    any_of: list[str] = field(default_factory=list)


def joined(found: Sequence[Certificate]) -> Certificate:
    """Several certificates that hold as one, each figure the largest."""

    def most(figures: Iterable[float | None]) -> float | None:
        measured = [f for f in figures if f is not None]
        return max(measured) if len(measured) == len(found) else None

    return Certificate(True, most(c.gap for c in found), max(c.constants for c in found), most(c.before for c in found),
                       most(c.after for c in found), any_of=sorted({op for c in found for op in c.any_of}))  # fmt: skip


class Overflow(Exception):
    """An edited constant is more than its type holds; the message says which."""


def with_copies(plan: Conversion, site: Site, copies: Mapping[Value, Value]) -> Norm:
    """A norm with the copies of its parameters that its own nodes read, where they read copies."""
    nodes = set(region(site.value, site.norm))

    def own(expr: Expr | None) -> Expr | None:
        return expr and tuple((c, tuple((now(v), e) for v, e in factors)) for c, factors in expr)

    def now(value: Value) -> Value:
        return copies[value] if value in copies and not nodes.isdisjoint(plan.copies[value]) else value

    return replace(site.norm, weight=own(site.norm.weight), bias=own(site.norm.bias))


@dataclass(slots=True)
class Record:
    """What became of one LayerNorm: the verdict, and for a converted one its proof, the name of its result and what it
    is now. Of an RMSNorm only where it is "folded". `path` is the place of the sub-graph that it stands in."""

    site: Site
    verdict: str
    code: str = ""
    reason: str = ""
    proof: Proof = field(default_factory=Proof)
    check: Certificate | None = None
    result: str = ""
    emitted: str = ""
    layer: dict[str, float] = field(default_factory=dict)
    path: Path = ()

    @staticmethod
    def kept(site: Site, code: str, why: str) -> Record:
        """The record of a norm that stays a LayerNorm."""
        return Record(site, "kept", code, why)

    @staticmethod
    def of(plan: Conversion, site: Site, check: Certificate | None, result: tuple[str, str]) -> Record:
        """The record of a converted norm."""
        proof = plan.proof[site]
        verdict = "exact with an operator" if proof.operators else "exact"
        return Record(site, verdict, "", "; ".join(proof.operators), proof, check, *result)

    @staticmethod
    def folded(plan: Conversion, site: Site, check: Certificate | None, result: tuple[str, str]) -> Record:
        """The record of an RMSNorm whose weight or bias is gone."""
        was, now = plan.inner.get(site, site).norm, plan.folded[site].norm
        lost = [name for name in ("weight", "bias") if getattr(was, name) and not getattr(now, name)]
        reasons = []
        if "bias" in lost and all(v in plan.zero for _, factors in was.bias or () for v, _ in factors):
            lost.remove("bias")
            reasons.append("its bias is zero")
        if lost:
            reasons.insert(0, f"its {' and '.join(lost)} went into the linear layers behind it")
        reason = ", and ".join(reasons)
        return Record(site, "folded", "", reason, check=check, result=result[0], emitted=result[1])

    @staticmethod
    def approximated(site: Site, layer: Layer, emitted: str) -> Record:
        """The record of a norm with a calibrated bias."""
        figures = {"mean_over_rms": layer.mean_over_rms, "naive_error": layer.naive, "error": layer.error}
        return Record(site, "approximate", result=layer.new, emitted=emitted, layer=figures)

    def to_dict(self) -> dict[str, Any]:
        """The certificate for JSON."""
        out: dict[str, Any] = {"verdict": self.verdict, "code": self.code, "reason": self.reason}
        if self.verdict in ("kept", "approximate"):
            return out | self.layer
        out |= {"derivation": self.proof.derivation, "readers": self.proof.readers, "edits": self.proof.edits,
                "operators": self.proof.operators, "value_dependent": self.proof.depends}  # fmt: skip
        if self.check is not None:
            out["check"] = {"max_rel": self.check.gap, "limit": LIMIT, "constants": self.check.constants,
                            "error_before": self.check.before, "error_after": self.check.after}  # fmt: skip
        return out


def changes(plan: Conversion, check: Certificate | None, results: Mapping[Site, tuple[str, str]]) -> list[Record]:
    """The records of all norms that a plan changes; `results` has what came of each, and what it is now."""
    return [Record.of(plan, site, check, results[site]) if site in plan.proof else
            Record.folded(plan, site, check, results[site]) for site in plan.changed()]  # fmt: skip


class Randomiser:
    """Random constants in the place of a model's, the same for the same name: as large as those, their means not zero.

    A constant that is nowhere negative stays so (a variance); masks (elements beyond `LARGE`) and single numbers stay
    as they are; those that a plan takes to be one number all over become another number. The second `attempt` stays
    near the model's own constants.
    """

    LARGE = 1e4

    def __init__(self, uniform: Collection[str], fixed: Collection[str] = ()) -> None:
        self.uniform, self.fixed = uniform, fixed
        self.replaced: set[str] = set()

    def __call__(self, name: str, array: Array, attempt: int = 0) -> Array:
        """The random constant for one in float64."""
        top = float(np.max(np.abs(array), initial=0.0))
        if array.size <= 1 or not top <= self.LARGE or name in self.fixed:
            return array
        self.replaced.add(name)
        scale = float(np.sqrt(np.mean(array * array))) or 1.0
        rng = np.random.default_rng(zlib.crc32(name.encode()) + attempt)
        if name in self.uniform:
            return np.full(array.shape, scale * (1.5 + rng.random()))
        noise = np.resize(rng.standard_normal(min(array.size, 1048573)), array.shape)
        if attempt:
            return np.asarray(array + scale * (0.01 + 0.01 * noise))
        return np.asarray(scale * (0.2 + np.abs(noise)) if array.min() >= 0 else scale * (0.5 + noise))


def apply(want: Centre, array: Array, scales: Sequence[Array]) -> Array:
    """A constant scaled and centred, in float64: ``P (g * w)`` along an axis, at some indices of another perhaps; to be
    rounded once."""
    out = array.astype(np.float64)
    for g in scales:
        shape = [1] * out.ndim
        shape[want.axis] = -1
        out = out * g.astype(np.float64).reshape(shape)
    out = np.moveaxis(out.copy() if not scales else out, want.axis, 0)
    for start, length in want.blocks:
        part = out[start : start + length]
        part -= part.mean(axis=0, keepdims=True)
    out = np.moveaxis(out, 0, want.axis)
    if want.only is None:
        return out
    axis, indices = want.only
    at = tuple(list(indices) if i == axis else slice(None) for i in range(out.ndim))
    part = array.astype(np.float64)
    part[at] = out[at]
    return part


def tell(report: Report, sites: Sequence[Site], records: Sequence[Record], paths: Mapping[Site, Path] = {}) -> None:
    """Put what became of each LayerNorm into the report on the converted model, whose norms are at `sites`, in
    sub-graphs at `paths`: two branches of an If may share names.

    A changed norm keeps the name, the kind, the place and the formula that it had in the model.
    """
    from normfuse.placement import recipe

    found: dict[tuple[str, Path], list[tuple[Site, NormRecord]]] = {}
    now, told = {site: site for site in sites}, set[Site]()
    for site, norm in zip(sites, report.norms, strict=True):
        for name in names_of(site):
            found.setdefault((name, paths.get(site, ())), []).append((site, norm))
    for record in records:
        was = record_of(record.site)
        names = [record.result] if record.result else names_of(record.site)
        same = next((found[key] for name in names if (key := (name, record.path)) in found), [])
        known = next((one for one in same if one[0] not in told), same[-1] if same else None)
        if known is None and record.verdict == "kept":
            continue
        if known is None or known[0] in told:  # it is not recognised as a norm again, or as one with another
            report.norms.append(was)
            known = record.site, was
        site, norm = known
        told.add(site)
        now[site] = record.site
        norm.conversion = None if record.verdict == "folded" else record.to_dict()
        if record.verdict == "kept":
            report.refusals.append(RefusalRecord(record.code, was.name, record.reason))
            continue
        if norm.action == "refused":  # the operator in its place stays as it is
            report.refusals = [r for r in report.refusals if r.node != site.label]
        norm.emitted = norm.emitted or record.emitted
        norm.name, norm.kind, norm.fact, norm.form = was.name, was.kind, was.fact, was.form
        norm.placement, norm.weight, norm.bias = was.placement, was.weight, was.bias
        norm.action, norm.reason = ("fused", record.reason) if record.verdict == "folded" else ("converted", "")
        if record.verdict == "approximate":
            norm.verified = None
        if record.check is not None:
            norm.verified = record.check.ok and norm.verified is not False
    if records:
        report.recipe = recipe(list(now.values()))


def still(sites: Sequence[Site], done: Sequence[Record]) -> list[Site]:
    """The LayerNorms among sites but those that records give: what was made of one, with the operator ahead of it that
    takes the mean away, is one again."""
    made = {record.result for record in done}
    return [s for s in sites if s.norm.kind == "layer_norm" and made.isdisjoint(names_of(s)[:1])]


def names_of(site: Site) -> list[str]:
    """The names of the values that a norm is made of, the last one first, or of an operator that nobody reads."""
    nodes = region(site.value, site.norm)
    values = [end_of(site.value), *(v for node in nodes for v in node.outputs)]
    return _names(values) or _names(nodes)


def _names(parts: Iterable[Value | Node]) -> list[str]:
    return [part.native.name for part in parts if hasattr(part.native, "name")]
