"""What was found and what was done, as one object for people and programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfuse.errors import path_of

if TYPE_CHECKING:
    from normfuse.calibrate import Approximation
    from normfuse.card import Card

SCHEMA = 1


@dataclass(slots=True)
class NormRecord:
    """One norm of a model.

    `axes` count from the end; `size` is None where the model leaves it open. `cast` tells where the rounding back
    stands, such as ``"float32, cast to float16 before the weight"``. `action` is one of "fused", "converted" (a
    LayerNorm that is an RMSNorm now; `conversion` has the verdict and the proof), "kept" (it is one operator
    already), "left" (nothing would be gained, `reason` says why) and "refused". `verified` is None where nothing
    was checked; `error_before` and `error_after` are the largest distances to float64 seen in that check, in units
    of the type's rounding, of the model's own arithmetic and of what replaced it. `proved` says that the region was
    moreover computed exactly, in integers modulo a prime, and is the norm.

    `module` and `operators`, which are for pages and not for JSON: the module that the exporter kept, and what
    computes the norm, in order; empty where nobody asked.
    """

    name: str
    kind: str
    axes: list[int]
    size: int | None
    eps: float
    dtype: str
    weight: str | None
    bias: str | None
    placement: str
    fact: str
    form: str
    cast: str
    action: str = "found"
    verified: bool | None = None
    emitted: str = ""
    reason: str = ""
    error_before: float | None = None
    error_after: float | None = None
    conversion: dict[str, Any] | None = None
    module: str = ""
    operators: list[str] = field(default_factory=list)
    proved: bool | None = None


@dataclass(slots=True)
class RefusalRecord:
    """What nearly was a norm, or could not be fused: `normfuse explain CODE` tells the rest."""

    code: str
    node: str
    message: str


@dataclass(slots=True)
class Report:
    """Result of `inspect`, `rewrite` and `optimize`; `to_dict()` is what `--json` prints, `to_html()` a page.

    `operators_before` and `operators_after` count operators by type. After a rewrite of an ONNX file there is no
    card: the page reads the file for it. `source` and `target` are the files, where there are any, and `replay` is
    the call that does it again, given the same calibration. `latency` is what `normfuse.bench.bench([source, target],
    How())` gives, where somebody asked, and `fastest` the files that `Config(first="fastest")` measured.
    """

    norms: list[NormRecord] = field(default_factory=list)
    refusals: list[RefusalRecord] = field(default_factory=list)
    recipe: str = ""
    format: str = ""
    opset: int | None = None
    rewritten: bool = False
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    model_check: dict[str, Any] | None = None
    approximation: Approximation | None = None
    card: Card | None = None
    operators_before: dict[str, int] = field(default_factory=dict)
    operators_after: dict[str, int] = field(default_factory=dict)
    source: str = ""
    target: str = ""
    replay: str = ""
    latency: dict[str, Any] | None = None
    fastest: dict[str, Any] | None = None

    @property
    def fused(self) -> int:
        """How many norms were put into an operator, alone or with neighbours."""
        return sum(n.action == "fused" for n in self.norms)

    @property
    def converted(self) -> int:
        """How many LayerNorms are RMSNorms now."""
        return sum(n.action == "converted" for n in self.norms)

    @property
    def refused(self) -> int:
        """How many refusals there are: of norms, and of what nearly was one."""
        return len(self.refusals)

    def recall(self, before: Report) -> None:
        """Take from the report on the model before a conversion what pages show of that: operators, modules, recipe."""
        known = {norm.name: norm for norm in before.norms}
        for norm in self.norms:
            if norm.name in known:
                norm.operators, norm.module = known[norm.name].operators, known[norm.name].module
        self.card, self.operators_before = before.card, before.operators_before
        self.nodes_before = before.nodes_before

    def totals(self) -> dict[str, int]:
        """The counts of a rewrite."""
        return {
            "found": len(self.norms),
            "fused": self.fused,
            "converted": self.converted,
            "refused": self.refused,
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
        }

    def to_dict(self) -> dict[str, Any]:
        """A plain dict, ready for JSON: the same input gives the same dict but for `summary.seconds`."""
        norms = [asdict(n) for n in self.norms]
        for n in norms:
            del n["module"], n["operators"]
            if n["conversion"] is None:
                del n["conversion"]
        if not self.rewritten:
            for n in norms:
                for key in ("action", "verified", "proved", "emitted", "reason", "error_before", "error_after"):
                    del n[key]
        summary: dict[str, Any] = {
            "recipe": self.recipe,
            "format": self.format,
            "opset": self.opset,
            "rms_norm": sum(n.kind == "rms_norm" for n in self.norms),
            "layer_norm": sum(n.kind == "layer_norm" for n in self.norms),
            "op": sum(n.form == "op" for n in self.norms),
            "decomposed": sum(n.form == "decomposed" for n in self.norms),
            "nodes": self.nodes_before,
            "notes": self.notes,
            "seconds": self.seconds,
        }
        if self.operators_before:
            summary["operators"] = self.operators_before
        if self.card is not None:
            summary["card"] = self.card.to_dict()
        out: dict[str, Any] = {"schema": SCHEMA, "norms": norms, "refusals": [asdict(r) for r in self.refusals]}
        if self.rewritten:
            summary |= self.totals()
            if self.operators_after:
                summary["operators_after"] = self.operators_after
            out |= self.totals()
            if self.model_check is not None:
                summary["model_check"] = self.model_check
            if self.approximation is not None:
                summary["approximation"] = self.approximation.to_dict()
            if self.latency is not None:
                summary["latency"] = self.latency
            if self.fastest is not None:
                summary["fastest"] = self.fastest
        return out | {"summary": summary}

    def to_html(self) -> str:
        """The report as one HTML page that loads nothing and runs nothing.

        What an ONNX model was before a rewrite is read from the file again, if that is still there.
        """
        from normfuse.html.rewrite_page import Before, page, prepare
        from normfuse.html.gallery_page import Entry, gallery

        if not self.rewritten:
            return gallery([Entry(self.source or "model", self)])
        same = bool(self.target) and Path(self.source).resolve() == Path(self.target).resolve()
        before = prepare(self.source) if self.source and not same and Path(self.source).is_file() else Before()
        return page(self, before)

    def save_html(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the page whole or not at all.

        Raises `InputError` for a file that is there already, unless `overwrite` allows to replace it and it is an HTML
        page, and always for a model.
        """
        from normfuse.html.page import check, write

        page, models = path_of(path, "the page"), [Path(p) for p in (self.source, self.target) if p]
        check(page, models, overwrite)
        write(self.to_html(), page, models, overwrite)
