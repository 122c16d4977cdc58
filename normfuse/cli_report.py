"""A report as lines and tables: equal norms in one row, so that a model of 80 layers fits on a screen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from normfuse.card import Card, layers_text
from normfuse.cli_print import Block, Table
from normfuse.report import NormRecord, Report

HEADERS = ("norm", "count", "kind", "size", "placement", "fact", "types", "action", "now", "verified")
MOST_BLOCKS = 8
FORMS = {"op": "one operator", "decomposed": "decomposed"}


def report_blocks(report: Report, path: str, seconds: float, verbose: bool, quiet: bool) -> list[Block]:
    """What was found, where it sits, what was done, and why not."""
    end = f"{_totals(report)}; {seconds:.2f} s"
    if quiet:
        return [end]
    blocks: list[Block] = [_header(report, path)]
    if report.recipe:
        blocks.append(report.recipe)
    if not report.rewritten and report.card is not None:
        blocks += card_lines(report.card)
    blocks.append("")
    if report.norms:
        blocks.append(_norm_table(report, verbose))
    if report.refusals:
        rows = [(r.code, r.node, r.message) for r in report.refusals]
        blocks += [Table(("code", "node", "why it was refused"), rows), _hint(report)]
    blocks += conversion_blocks(report, verbose)
    if report.fastest is not None:
        blocks.append(files_table(report.fastest))
    blocks += [f"note: {note}" for note in report.notes]
    if report.model_check is not None:
        blocks.append(f"whole model: {_verdict(report.model_check)}")
    if report.latency is not None:
        from normfuse.cli_bench import bench_blocks

        blocks += ["", *bench_blocks(report.latency, False), ""]
    blocks.append(end)
    if verbose and report.seconds:
        blocks.append("time: " + ", ".join(f"{stage} {t:.3f} s" for stage, t in report.seconds.items()))
    return blocks


def card_lines(card: Card) -> list[Block]:
    """The layers as mathematics: each kind of layer once, and how it differs from the most common kind."""
    out: list[Block] = []
    for i, stack in enumerate(card.stacks):
        for block in stack.blocks[:MOST_BLOCKS]:
            name = layers_text(block.layers, stack.depth)
            out += ["", name if len(card.stacks) == 1 else f"stack {i + 1}, {name}"]
            formulas = [card.formula(branch) for branch in block.branches]
            width = max(map(len, formulas))
            for formula, branch in zip(formulas, block.branches, strict=True):
                out.append(f"  {formula:{width}}  {'; '.join(card.remarks(branch))}".rstrip())
            out += [f"  {line}" for line in card.differences(block, stack.blocks[0])]
        if len(stack.blocks) > MOST_BLOCKS:
            out += ["", f"and {len(stack.blocks) - MOST_BLOCKS} more kinds of layers"]
    return out


def _header(report: Report, path: str) -> str:
    opset = "" if report.opset is None else f", opset {report.opset}"
    return f"{path}: {report.format or 'model'}{opset}, {report.nodes_before} operators"


def _hint(report: Report) -> str:
    return f"`normfuse explain {report.refusals[0].code}` tells more about a code"


def _totals(report: Report) -> str:
    norms = report.norms
    if not report.rewritten:
        ready = sum(n.form == "op" for n in norms)
        return f"found {len(norms)} ({len(norms) - ready} decomposed, {ready} one operator), refused {report.refused}"
    text = f"found {len(norms)}, fused {report.fused}, refused {report.refused}"
    if report.converted:
        text = f"found {len(norms)}, fused {report.fused}, converted {report.converted}, refused {report.refused}"
    text += f"; operators {report.nodes_before} -> {report.nodes_after}"
    checked = [n.verified for n in norms if n.verified is not None]
    proved = sum(bool(n.proved) for n in norms)
    return text + (f"; verified {sum(checked)}/{len(checked)}, {proved} proved" if checked else "")


def _norm_table(report: Report, verbose: bool) -> Table:
    groups: dict[object, list[NormRecord]] = {}
    for i, norm in enumerate(report.norms):
        groups.setdefault(i if verbose else _likeness(norm), []).append(norm)
    shared = len(groups) < len(report.norms)
    plain = all(norm.cast == norm.dtype for norm in report.norms)
    return Table(HEADERS, [_row(group, report.rewritten, shared, plain) for group in groups.values()])


def _likeness(norm: NormRecord) -> tuple[object, ...]:
    """What norms of one row have in common."""
    return (norm.kind, norm.placement, norm.size, norm.eps, norm.fact, norm.cast, norm.dtype, norm.form, norm.action,
            norm.emitted)  # fmt: skip


def _row(group: list[NormRecord], rewritten: bool, shared: bool, plain: bool) -> tuple[str, ...]:
    first, last = group[0], group[-1]
    return (
        first.name if len(group) == 1 else f"{first.name} ... {last.name}",
        f"x{len(group)}" if shared else "",
        first.kind,
        "?" if first.size is None else str(first.size),
        first.placement,
        first.fact,
        "" if plain else first.cast,
        first.action if rewritten else FORMS.get(first.form, first.form),
        first.emitted,
        _verified(n.verified for n in group) if rewritten else "",
    )


def _verified(results: Iterable[bool | None]) -> str:
    checked = [r for r in results if r is not None]
    if not checked:
        return ""
    return "yes" if all(checked) else "no" if not any(checked) else f"{sum(checked)} of {len(checked)}"


def files_table(found: dict[str, Any]) -> Table:
    """What `first="fastest"` measured, in milliseconds, and in parts of the model as it is."""
    from normfuse.cli_bench import ms

    shapes = [", ".join("x".join(map(str, shape)) or "scalar" for shape in one.values()) for one in found["inputs"]]
    rows = [(f["name"], *(f"{ms(t)} ({r:.3f})" for t, r in zip(f["milliseconds"], f["ratio"], strict=True)),
             "chosen" if f["chosen"] else "") for f in found["files"]]  # fmt: skip
    return Table(("the model", *(f"ms, {shape}" for shape in shapes), ""), rows)


def conversion_blocks(report: Report, verbose: bool) -> list[Block]:
    """What was made of the LayerNorms, and why that is right: the certificate; with `verbose` the proof of each."""
    asked = [n for n in report.norms if n.conversion is not None]
    done = [n for n in asked if n.action == "converted" and (n.conversion or {})["verdict"] != "approximate"]
    rough = _approximation_blocks(report, [n for n in asked if (n.conversion or {})["verdict"] == "approximate"])
    if not done:
        return rough
    places = list(dict.fromkeys(o for n in done for o in (n.conversion or {})["operators"]))
    edits = sum(len((n.conversion or {})["edits"]) for n in done)
    more = f", {len(places)} centring operator{'s'[: len(places) != 1]}" if places else ""
    blocks: list[Block] = [f"LayerNorm to RMSNorm: {len(done)} of {len(asked)}, {edits} weights edited{more}"]
    blocks += [f"  operator {place}" for place in places]
    check = (done[0].conversion or {}).get("check")
    if check:
        text = f"certificate: equal to {check['max_rel']:.1e} in float64 with {check['constants']} random weights"
        if check["error_after"] is not None:
            text += (f"; with its own, {check['error_after']:.1e} from float64 (the original "
                     f"{check['error_before']:.1e})")  # fmt: skip
        blocks.append(text)
    for norm in done if verbose else ():
        proof = norm.conversion or {}
        blocks.append(f"{norm.name}: {proof['verdict']}")
        for title, key in (("because", "derivation"), ("read by", "readers"), ("edited", "edits"),
                           ("rests on", "value_dependent")):  # fmt: skip
            blocks += [f"  {title} {line}" for line in proof[key]]
    return blocks + rough


def _approximation_blocks(report: Report, norms: list[NormRecord]) -> list[Block]:
    """The approximated norms, each with a bar for how much mean its input carries and how far its result is off."""
    found = report.approximation
    if found is None:
        return []
    rows = []
    for norm in norms:
        c = norm.conversion or {}
        rows.append((norm.name, f"{c['mean_over_rms']:.2f} {bar(c['mean_over_rms'])}", f"{c['naive_error']:.3f}",
                     f"{c['error']:.3f} {bar(c['error'])}"))  # fmt: skip
    floor = "" if found.floor is None else f", the original's own noise {found.floor:.1e}"
    total = (f"approximated {len(norms)} on {found.calibrated} sets of inputs; on {found.held_back} held back the "
             f"outputs are off by {found.error:.2g} (with the old biases {found.naive:.2g}{floor}; allowed "
             f"{found.tolerance:g}), 1 - cos {found.cosine:.1e} ({found.naive_cosine:.1e})")  # fmt: skip
    return [Table(("norm", "mean/rms", "old bias", "off by"), rows), total]


def bar(share: float, width: int = 12) -> str:
    """A bar for a number from 0 to 1, longer ones cut."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")


# -- comparison of two models -------------------------------------------------------------------------------------


def comparison_blocks(result: dict[str, Any], quiet: bool) -> list[Block]:
    """The outputs of two models side by side, and the verdict."""
    if quiet:
        return [_verdict(result)]
    rows = [
        (o["name"], str(o["dtype"]), "x".join(map(str, o["shape"] or ())), _gap(o["max_abs"]), _gap(o["max_rel"]))
        for o in result["outputs"]
    ]
    notes = [f"note: output {o['name']!r} {_unsaid(o)}" for o in result["outputs"] if _unsaid(o)]
    if result["equal"]:
        notes += [f"note: compared with {name} true, and false" for name in result.get("flags", ())]
    return [Table(("output", "type", "shape", "max abs diff", "max rel diff"), rows), *notes, _verdict(result)]


def _unsaid(output: dict[str, Any]) -> str:
    """How much of an output its distances say nothing of."""
    if why := output.get("not_compared"):
        return f"has {why}, and was not compared"
    share = output.get("not_finite", 0.0)
    return f"is NaN or infinite in {share:.2g} of its elements" if share else ""


def _gap(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _verdict(result: dict[str, Any]) -> str:
    if not result["equal"]:
        from normfuse.verify import difference

        measured = all("other" not in o for o in result["outputs"])
        allowed = f" ({result['tolerance']:g} roundings are allowed)" if measured else ""
        return f"different: {difference(result)}{allowed}; {result['provider']}"
    whole = result.get("float64") == "model"
    if (far := [o for o in result["outputs"] if "unoptimised" in o]) and not whole:
        own, gap = (max(o[key] for o in far) for key in ("unoptimised", "max_rel"))
        return (f"equal: the result is {gap:.2g} of an output's largest element from the input, and that itself is "
                f"{own:.2g} from what it gives without ONNX Runtime's optimisers; {result['provider']}")  # fmt: skip
    if far := [o for o in result["outputs"] if "before" in o]:
        before, after = (max(o[key] for o in far) for key in ("before", "after"))
        norms = "" if whole else "with its norms "
        return (f"equal: from the input {norms}in float64, the result is {after:.2g} of an output's largest "
                f"element and the input itself {before:.2g}; {result['provider']}")  # fmt: skip
    worst = max((o["max_rel"] or 0.0 for o in result["outputs"]), default=0.0)
    return f"equal: largest difference {worst:.2g} of an output's largest element; {result['provider']}"
