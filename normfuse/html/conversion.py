"""What became of the LayerNorms: verdicts with their derivations, and what an approximation costs, norm by norm."""

from __future__ import annotations

from typing import Any

from normfuse.html import svg
from normfuse.html.page import fold, items, name, table, text
from normfuse.report import NormRecord, Report

MOST = 300
"""Derivations on a page, and lines of each list in one."""
LINES = 40
PROOF = (("because", "derivation"), ("read by", "readers"), ("edited", "edits"), ("operators", "operators"),
         ("rests on the values of", "value_dependent"))  # fmt: skip


def conversion(report: Report) -> str:
    """The section, or nothing where no conversion was asked for."""
    asked = [(n, n.conversion) for n in report.norms if n.conversion is not None]
    if not asked:
        return ""
    exact = [(n, c) for n, c in asked if c["verdict"] not in ("kept", "approximate")]
    kept = [(n, c) for n, c in asked if c["verdict"] == "kept"]
    out = [f"<p>{len(asked) - len(kept)} of {len(asked)} LayerNorms are RMSNorms now.</p>"]
    check = next((c["check"] for _, c in exact if c.get("check")), None)
    if check is not None:
        words = f"Certificate: equal to {check['max_rel']:.1e} in float64 with {check['constants']} random weights"
        if check.get("error_after") is not None:
            words += (f"; with its own weights the result is {check['error_after']:.1e} from float64, the original "
                      f"{check['error_before']:.1e}")  # fmt: skip
        out.append(f"<p>{text(words)}.</p>")
    out += [_proof(n, c, i == 0) for i, (n, c) in enumerate(exact[:MOST])]
    if len(exact) > MOST:
        out.append(f'<p class="muted">{len(exact) - MOST} more derivations are left out; --json has them.</p>')
    if kept:
        rows = [(name(n.name), text(c["code"]), text(c["reason"])) for n, c in kept]
        out.append(fold(f"{len(kept)} stay LayerNorms", table(("norm", "code", "why"), rows, label="kept"), not exact))
    out.append(_approximated(report, [(n, c) for n, c in asked if c["verdict"] == "approximate"]))
    return "\n".join(filter(None, out))


def _proof(norm: NormRecord, proof: dict[str, Any], is_open: bool) -> str:
    facts = []
    for title, key in PROOF:
        lines = proof.get(key) or []
        more = [f"and {len(lines) - LINES} more"] if len(lines) > LINES else []
        if lines:
            facts.append((title, "<br>".join(text(line, 300) for line in [*lines[:LINES], *more])))
    return fold(f"{name(norm.name)} {text(proof['verdict'])}", items(facts), is_open)


def _approximated(report: Report, norms: list[tuple[NormRecord, dict[str, Any]]]) -> str:
    found = report.approximation
    if found is None:
        return ""
    floor = "" if found.floor is None else f"; the original's own distance to float64 is {found.floor:.1e}"
    words = (f"Approximated {len(norms)} norms with biases calibrated on {found.calibrated} sets of inputs. On "
             f"{found.held_back} held back, the outputs are off by {found.error:.2g} (with the old biases "
             f"{found.naive:.2g}; allowed {found.tolerance:g}), 1 − cos {found.cosine:.1e} "
             f"({found.naive_cosine:.1e}){floor}.")  # fmt: skip
    out = [f"<p>{text(words)}</p>"]
    if norms:
        ratio = svg.dots([("after", [c["mean_over_rms"] for _, c in norms])], "", "mean over rms of each input")
        error = svg.dots([("before", [c["naive_error"] for _, c in norms]), ("after", [c["error"] for _, c in norms])],
                         "", "error of each result with the old bias and with the calibrated one")  # fmt: skip
        out += [_plot("How much mean each input carries: |mean| over rms", ratio),
                _plot('How far each result is off: <span class="key before"></span>with the old bias, '
                      '<span class="key after"></span>with the calibrated one', error)]  # fmt: skip
        keys = ("mean_over_rms", "naive_error", "error")
        rows = [(name(n.name), *(f"{c[key]:.3g}" for key in keys)) for n, c in norms]
        out.append(table(("norm", "mean/rms", "off by, old bias", "off by"), rows, (1, 2, 3), "approximated norms"))
    return "\n".join(out)


def _plot(title: str, drawing: str) -> str:
    return f"<figure><figcaption>{title}</figcaption>{drawing}</figure>"
