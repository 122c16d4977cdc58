"""LayerNorm to RMSNorm: what is done to constants, and the certificate of each norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from normfuse.centring import Centre
from normfuse.norm import Site
from normfuse.passes.layernorm_to_rmsnorm import Conversion

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
