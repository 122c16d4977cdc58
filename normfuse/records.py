"""What a report says of each norm and each refusal of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from normfuse.card import card_of
from normfuse.facts import Atom, formula
from normfuse.norm import Expr, Norm, Site, region
from normfuse.placement import recipe
from normfuse.plan import Edit, Plan
from normfuse.report import NormRecord, RefusalRecord, Report
from normfuse.verify import Check


def build_report(plans: Sequence[Plan], checks: dict[Site, Check], rewritten: bool,
                 label: Callable[[Edit], str], module: Callable[[Any], str] | None) -> Report:  # fmt: skip
    """The records of all sites and refusals of a model.

    `module` gives the module that a native node comes from; None leaves out all that only pages need.
    """
    report = Report(rewritten=rewritten)
    records: dict[Site, NormRecord] = {}
    for plan in plans:
        edits = {site: edit for edit in plan.edits() for site in edit.sites}
        for site in plan.found.sites:
            record = records[site] = record_of(site)
            if module is not None:
                nodes = region(site.value, site.norm)
                steps = (node for node in reversed(nodes) if node.kind != "identity")  # a dropout ahead is no part
                record.operators = list({node.native or node: node.op for node in steps}.values())
                natives = (node.native for node in nodes if node.native is not None)
                record.module = next(filter(None, map(module, natives)), "")
            if rewritten:
                record.action = ("fused" if site in edits else "left" if site in plan.left else
                                 "refused" if site in plan.refused else "kept")  # fmt: skip
                record.reason = plan.left.get(site, "")
                if record.action in ("kept", "left"):  # an operator of the model, of which no larger one could be made
                    tried = (f"as {op} it failed: {why.message}" for (op, at), why in plan.broken.items() if at is site)
                    record.reason = next(tried, record.reason)
                check = checks.get(site)
                record.verified = check.ok if check is not None else None
                record.proved = check.proved if check is not None else None
                if check is not None and check.ok:
                    record.error_before, record.error_after = round(check.before, 2), round(check.after, 2)
                edit = edits.get(site)
                if edit is not None:
                    record.emitted = label(edit)
            report.norms.append(record)
        refusals = [*plan.found.refusals, *plan.refused.values()]
        report.refusals.extend(RefusalRecord(r.code, r.node, r.message) for r in refusals)
    report.recipe = recipe(list(records))
    if plans and module is not None:
        report.card = card_of(plans[0].graph, plans[0].found.sites, records)
    return report


def record_of(site: Site) -> NormRecord:
    """What the report says of a site."""
    norm = site.norm
    rank = norm.x.rank or 0
    names: dict[int, str] = {}
    for letter, expr in (("w", norm.weight), ("b", norm.bias)):
        found: list[int] = []
        for _, factors in expr or ():
            found += [v.index for v, _ in factors if v.index not in names and v.index not in found]
        for i, index in enumerate(found):
            names[index] = letter if len(found) == 1 else f"{letter}{i + 1}"

    def name(atom: Atom) -> str:
        return names.get(int(str(atom[1])), str(atom[2]))

    return NormRecord(
        name=site.label,
        kind=norm.kind,
        axes=[a - rank for a in norm.axes],
        size=norm.size,
        eps=norm.eps,
        dtype=norm.x.dtype or "?",
        weight=_named(norm.weight),
        bias=_named(norm.bias),
        placement=site.placement,
        fact=formula(site.fact, "x", name),
        form="op" if site.is_op else "decomposed",
        cast=_cast(norm),
    )


def _named(expr: Expr | None) -> str | None:
    if expr is None:
        return None
    names = [v.name for _, factors in expr for v, _ in factors]
    return "+".join(dict.fromkeys(names)) if names else "constant"


def _cast(norm: Norm) -> str:
    if norm.cast == "mixed":
        return "mixed"
    if norm.cast == "none":
        return norm.compute
    where = "before the weight" if norm.cast == "first" else "after the weight" if norm.weight else "at the end"
    return f"{norm.compute}, cast to {norm.narrow or norm.dtype} {where}"
