"""LayerNorm to RMSNorm: what is done to constants, and the certificate of each norm."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from normfuse.centring import Centre
from normfuse.norm import Site, region
from normfuse.passes.layernorm_to_rmsnorm import Conversion
from normfuse.report import NormRecord, RefusalRecord, Report

Array = np.ndarray[Any, Any]
LIMIT = 1e-12
"""How far the re-randomised models may differ in float64, relative to the largest element of an output."""


@dataclass(frozen=True, slots=True)
class Constants:
    """A constant of the result: a constant of the original by name, centred, after a product with `scales`."""

    source: str
    want: Centre
    scales: tuple[str, ...] = ()


@dataclass(slots=True)
class Certificate:
    """The check of a whole conversion.

    `gap`: largest difference of the outputs of the two models in float64 with all their constants replaced by random
    ones whose means are not zero, relative to the largest element. `before`, `after`: distances to float64 of the
    original and the result with their own weights in their own types; None where they were not measured.
    """

    ok: bool
    gap: float | None = None
    constants: int = 0
    before: float | None = None
    after: float | None = None
    message: str = ""


@dataclass(slots=True)
class Record:
    """What became of one LayerNorm: the verdict, and for a converted one its proof."""

    site: Site
    verdict: str
    code: str = ""
    reason: str = ""
    derivation: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    edits: list[str] = field(default_factory=list)
    operators: list[str] = field(default_factory=list)
    value_dependent: list[str] = field(default_factory=list)
    check: Certificate | None = None
    result: str = ""

    @staticmethod
    def of(plan: Conversion, site: Site, check: Certificate | None, result: str) -> Record:
        """The record of a converted norm."""
        proof = plan.proof[site]
        verdict = "exact with an operator" if proof.operators else "exact"
        return Record(site, verdict, "", "; ".join(proof.operators), proof.derivation, proof.readers, proof.edits,
                      proof.operators, proof.depends, check, result)  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The certificate for JSON."""
        out: dict[str, Any] = {"verdict": self.verdict, "code": self.code, "reason": self.reason}
        if self.verdict == "kept":
            return out
        out |= {"derivation": self.derivation, "readers": self.readers, "edits": self.edits,
                "operators": self.operators, "value_dependent": self.value_dependent}  # fmt: skip
        if self.check is not None:
            out["check"] = {"max_rel": self.check.gap, "limit": LIMIT, "constants": self.check.constants,
                            "error_before": self.check.before, "error_after": self.check.after}  # fmt: skip
        return out


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
            return np.asarray(array + scale * (0.1 + 0.1 * noise))
        return np.asarray(scale * (0.2 + np.abs(noise)) if array.min() >= 0 else scale * (0.5 + noise))


def worst(want: Sequence[Any], got: Sequence[Any]) -> float:
    """The largest difference of two lists of outputs, each relative to its largest element."""
    gaps = [relative(np.asarray(a), np.asarray(b)) for a, b in zip(want, got, strict=True)]
    return max(gaps, default=0.0)


def relative(want: Array, got: Array) -> float:
    """The largest difference relative to the largest element; infinite where shapes, integers or NaNs differ."""
    if want.shape != got.shape or want.dtype.kind not in "fc":
        return 0.0 if want.shape == got.shape and (want == got).all() else float("inf")
    top = float(np.max(np.abs(want), initial=0.0))
    if (np.isnan(want) != np.isnan(got)).any():
        return float("inf")
    return float(np.nanmax(np.abs(want - got), initial=0.0)) / top if top else float(np.abs(got).max(initial=0.0))


def refusals(site: Site, code: str, why: str) -> Record:
    """The record of a norm that stays a LayerNorm."""
    return Record(site, "kept", code, why)


def apply(want: Centre, array: Array, scales: Sequence[Array]) -> Array:
    """A constant scaled and centred, in float64: ``P (g * w)`` along an axis; to be rounded once."""
    out = array.astype(np.float64)
    for g in scales:
        shape = [1] * out.ndim
        shape[want.axis] = -1
        out = out * g.astype(np.float64).reshape(shape)
    out = np.moveaxis(out.copy() if not scales else out, want.axis, 0)
    for start, length in want.blocks:
        part = out[start : start + length]
        part -= part.mean(axis=0, keepdims=True)
    return np.moveaxis(out, 0, want.axis)


def tell(report: Report, sites: Sequence[Site], records: Sequence[Record]) -> None:
    """Put what became of each LayerNorm into the report on the converted model, whose norms are at `sites`.

    A converted norm keeps the name, the kind and the formula that it had in the model.
    """
    from normfuse.api import record_of

    found: dict[str | None, tuple[Site, NormRecord]] = {}
    for site, norm in zip(sites, report.norms, strict=True):
        found |= {name: (site, norm) for name in _names(site)}
    for record in records:
        was = record_of(record.site)
        names = [record.result] if record.result else _names(record.site)
        site, norm = next((found[name] for name in names if name in found), (None, None))
        if norm is None:
            continue
        norm.conversion = record.to_dict()
        if record.verdict == "kept":
            report.refusals.append(RefusalRecord(record.code, was.name, record.reason))
            continue
        if norm.action == "refused" and site is not None:  # the operator in its place stays as it is
            report.refusals = [r for r in report.refusals if r.node != site.label]
        norm.emitted = norm.emitted or ("RMSNorm operator" if norm.form == "op" else "function normfuse.rms_norm")
        norm.name, norm.kind, norm.fact, norm.form, norm.action = was.name, was.kind, was.fact, was.form, "converted"
        norm.reason = ""
        if record.check is not None:
            norm.verified = record.check.ok and norm.verified is not False


def _names(site: Site) -> list[str]:
    """The names of the values that a norm is made of, the last one first."""
    end = site.value
    while end.native is None and end.uses:
        end = end.uses[0].outputs[0]
    values = [end, *(v for node in region(site.value, site.norm) for v in node.outputs)]
    return [v.native.name for v in values if hasattr(v.native, "name")]
