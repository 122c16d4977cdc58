"""The report on a rewrite as a page: what was done to each norm, why that is right, and how to do it again."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from normfuse.codes import CODES
from normfuse.errors import NormFuseError
from normfuse.html import svg
from normfuse.html.conversion import conversion
from normfuse.html.gallery_page import recipe
from normfuse.html.page import document, fold, formula, items, many, name, section, table, text
from normfuse.report import NormRecord, RefusalRecord, Report

PACKAGES = ("normfuse", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy")
MOST_SITES, MOST_REFUSED = 1000, 200
"""Rows of norms on a page, and of refusals under one code."""
MOST_GROUPS = 200
OPEN = 2
"""Groups of norms that are unfolded from the start."""
IN_MEMORY = {"onnx": "ONNX model", "exported": "exported program", "fx": "FX graph", "module": "PyTorch module"}
PLACES = {"pre": "pre-norm", "post": "post-norm inside the residual", "post_residual": "post-norm after the residual",
          "sandwich_pre": "sandwich, before", "sandwich_post": "sandwich, after", "qk": "QK-norm",
          "latent": "latent norm", "gated": "gated norm", "embedding": "embedding norm", "final": "final norm",
          "other": "in another place"}  # fmt: skip
TAGS = {"fused": "good", "converted": "good", "kept": "", "left": "", "refused": "warn"}


@dataclass(slots=True)
class FileFacts:
    """A file: size and SHA-256; `data` are its weights beside it, by name and size, not hashed."""

    name: str
    size: int
    digest: str
    data: list[tuple[str, int]] = field(default_factory=list)


@dataclass(slots=True)
class Before:
    """What a model was before the rewrite: the report of `inspect`, and the file."""

    report: Report | None = None
    file: FileFacts | None = None


def prepare(path: str | Path) -> Before:
    """Look at a model that is about to be rewritten."""
    from normfuse.api import inspect

    return Before(None if Path(path).suffix == ".pt2" else inspect(path), file_facts(Path(path)))


def file_facts(path: Path) -> FileFacts:
    """Size and hash of a file, and sizes of the files that it refers to."""
    from normfuse.io import files

    with path.open("rb") as f:
        found = FileFacts(path.name, path.stat().st_size, hashlib.file_digest(f, "sha256").hexdigest())
    if path.suffix != ".pt2":
        try:
            model = files.read_onnx(path)[0]
            beside = {Path(t.base_dir) / t.location for t in files.external_tensors(model)}
            found.data = sorted((p.name, p.stat().st_size) for p in beside)
        except (NormFuseError, OSError):
            pass
    return found


def page(report: Report, before: Before, command: str = "") -> str:
    """The page. `command` is what was typed."""
    after = file_facts(Path(report.target)) if report.target and Path(report.target).is_file() else None
    source = (before.file.name if before.file else Path(report.source).name if report.source else
              IN_MEMORY.get(report.format, report.format or "model"))  # fmt: skip
    title = f"{source} rewritten by NormFuse"
    parts = [("norms", "Norms", _sites(report, before)), ("operators", "Operators", _operators(report)),
             ("latency", "Latency", _latency(report)), ("errors", "Distance to float64", _errors(report)),
             ("conversion", "LayerNorm to RMSNorm", conversion(report)),
             ("refusals", "Refused", _refusals(report.refusals)),
             ("recipe", "Recipe", _recipe(report, before)),
             ("again", "Files, versions, and how to do it again", _again(report, before.file, after, command)),
             ]  # fmt: skip
    shown = [part for part in parts if part[2]]
    links = " ".join(f'<a href="#{key}">{label}</a>' for key, label, _ in shown)
    head = (f'<header><p class="kicker">NormFuse rewrite report</p><h1>{name(source)}</h1>'
            f"<section aria-label=\"result\">{_verdict(report)}{_tiles(report, before.file, after)}"
            f'{"".join(f"<p class=muted>{text(note)}</p>" for note in report.notes)}</section></header>')  # fmt: skip
    body = "\n".join(section(key, label, content) for key, label, content in shown)
    return document(title, f'{head}<nav aria-label="sections">{links}</nav>{body}')


# -- the top ---------------------------------------------------------------------------------------------------------


def _verdict(report: Report) -> str:
    found, changed = len(report.norms), report.fused + report.converted
    checked = [n.verified for n in report.norms if n.verified is not None]
    words = f"{changed} of {found} norms replaced" if changed else "Nothing was replaced"
    if checked:
        words += f"; {sum(checked)} of {len(checked)} checked against the original and equal"
        proved = sum(bool(n.proved) for n in report.norms)
        words += f", {proved} proved in exact arithmetic" if proved else ""
    elif changed:
        words += "; not checked (verify=off)"
    rough = sum((n.conversion or {}).get("verdict") == "approximate" for n in report.norms)
    if rough and report.approximation is not None:
        words += f"; {rough} approximated, which leaves the outputs off by {report.approximation.error:.2g}"
    if report.model_check is not None:
        equal = report.model_check["equal"]
        words += "; the whole model gives equal outputs" if equal else "; the whole model gives other outputs"
    if report.refused:
        words += f"; {report.refused} refused, with the reason below"
    bad = not all(checked) or (report.model_check is not None and not report.model_check["equal"])
    kind = "bad" if bad else "warn" if report.refused or rough or (changed and not checked) else "good"
    return f'<p class="verdict {kind}">{text(words)}.</p>'


def _tiles(report: Report, old: FileFacts | None, new: FileFacts | None) -> str:
    count = {action: sum(n.action == action for n in report.norms) for action in TAGS}
    pairs = [(str(len(report.norms)), "norms found")]
    pairs += [(str(count[a]), words) for a, words in (("fused", "fused"), ("converted", "converted to RMSNorm"),
              ("kept", "one operator already"), ("left", "left: nothing to gain")) if count[a]]  # fmt: skip
    if report.refused:
        pairs.append((str(report.refused), "refused"))
    pairs.append((_change(report.nodes_before, report.nodes_after), "operators" + _share(report)))
    if old and new:
        pairs.append((_joined(size(_whole(old)), size(_whole(new))), "file" + " and weights" * bool(old.data)))
    pairs += _medians(report)
    return '<div class="tiles">' + "".join(
        f'<div class="tile"><b>{value}</b><span>{words}</span></div>' for value, words in pairs) + "</div>"  # fmt: skip


def _joined(old: str, new: str) -> str:
    return f'<span class="nb">{old} →</span> <span class="nb">{new}</span>'


def _change(a: int, b: int) -> str:
    return f"{a:,} → {b:,}"


def _share(report: Report) -> str:
    if not report.nodes_before or report.nodes_before == report.nodes_after:
        return ""
    return f", {100 * (report.nodes_after / report.nodes_before - 1):+.0f} %".replace("-", "−")


def _whole(file: FileFacts) -> int:
    return file.size + sum(n for _, n in file.data)


def size(n: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" or n >= 100 else f"{n:.1f} {unit}"
        n /= 1024
    return ""


def _recipe(report: Report, before: Before) -> str:
    card = before.report.card if before.report else report.card
    return f"<p>{text(report.recipe)}</p>{recipe(card)}" if card is not None and card.norms else ""


# -- norms -----------------------------------------------------------------------------------------------------------


def _sites(report: Report, before: Before) -> str:
    if not report.norms:
        return "<p>This model has no LayerNorm and no RMSNorm that NormFuse recognises.</p>"
    known: dict[str, NormRecord] = {}
    for norm in before.report.norms if before.report else ():
        known.setdefault(norm.name, norm)
    groups: dict[tuple[object, ...], list[NormRecord]] = {}
    steps: dict[tuple[object, ...], list[str]] = {}
    for norm in report.norms:
        was = norm if norm.operators else known.get(norm.name, norm)
        key: tuple[object, ...] = (
            norm.kind, norm.placement, norm.size, norm.fact, norm.cast, norm.action, norm.emitted, norm.reason,
            (norm.conversion or {}).get("verdict") == "approximate", *was.operators,
        )  # fmt: skip
        groups.setdefault(key, []).append(norm)
        steps.setdefault(key, was.operators)
    out, left = [], MOST_SITES
    for i, (key, norms) in enumerate(list(groups.items())[:MOST_GROUPS]):
        out.append(_group(norms, steps[key], known, i < OPEN, max(left, 0)))
        left -= len(norms)
    if len(groups) > MOST_GROUPS:
        out.append(f'<p class="muted">{len(groups) - MOST_GROUPS} more groups are left out; --json has all norms.</p>')
    return "\n".join(out)


def _group(norms: list[NormRecord], steps: list[str], known: dict[str, NormRecord], is_open: bool, most: int) -> str:
    one = norms[0]
    kind = {"rms_norm": "RMSNorm", "layer_norm": "LayerNorm"}.get(one.kind, text(one.kind))
    rough = (one.conversion or {}).get("verdict") == "approximate"
    tag = f'<span class="tag {TAGS.get(one.action, "")}">{text(one.action)}</span>'
    tag = '<span class="tag warn">approximated</span>' if rough else tag
    summary = (f"<strong>{len(norms)} × {kind}, {text(PLACES.get(one.placement, one.placement))}</strong>, width "
               f"{'?' if one.size is None else one.size} {tag}")  # fmt: skip
    was = _chips(steps) if steps else text("one operator" if one.form == "op" else "decomposed")
    now = _chips(one.emitted.split(", "), " new") if one.emitted else '<span class="muted">as it was</span>'
    facts = [("formula", formula(one.fact)), ("roundings", text(one.cast))]
    if one.reason:
        facts.append(("why", text(one.reason)))
    size_ = f", {many(len(steps), 'operator')}" if steps else ""
    sides = (f'<div class="sides"><div><p class="muted">before{size_}</p>{was}</div>'
             f'<span class="arrow" aria-hidden="true">→</span>'
             f'<div><p class="muted">now</p>{now}</div></div>')  # fmt: skip
    rows = []
    for norm in norms:
        source = norm.module or getattr(known.get(norm.name), "module", "")
        shown = "" if norm.name.startswith(f"{source}/") else source  # where its name has it already
        named = [name(value) if value else "" for value in
                 (norm.name, shown, _inside(norm.weight, source), _inside(norm.bias, source))]  # fmt: skip
        checked = "" if norm.verified is None else "no" if not norm.verified else "proved" if norm.proved else "yes"
        rows.append((*named, checked, _ulp(norm.error_before), _ulp(norm.error_after)))
    headers = ("norm", "module", "weight", "bias", "verified", "ulp before", "ulp now")
    listed = table(headers, rows, (5, 6), "norms of this kind", most)
    return fold(summary, items(facts) + sides + (fold(many(len(norms), "norm"), listed, len(norms) <= 4)), is_open)


def _inside(value: str | None, module: str) -> str:
    """A parameter of the module beside it, without its path."""
    whole = value or ""
    return whole[len(module) :] if module and whole.startswith(f"{module}.") else whole


def _chips(names: Iterable[str], mark: str = "") -> str:
    return '<div class="ops">' + "".join(f'<span class="op{mark}">{text(n, 60)}</span>' for n in names) + "</div>"


def _ulp(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


# -- operators and errors --------------------------------------------------------------------------------------------


def _operators(report: Report) -> str:
    before, after = report.operators_before, report.operators_after
    if not before or not after:
        return ""
    change = {op: after.get(op, 0) - before.get(op, 0) for op in (*before, *after)}
    names = sorted(change, key=lambda op: (-abs(change[op]), -before.get(op, 0), op))
    largest = max([*before.values(), *after.values()])

    def rows(chosen: list[str]) -> list[tuple[str, ...]]:
        return [(text(op, 60), f"{before.get(op, 0):,}", f"{after.get(op, 0):,}",
                 f"{change[op]:+,}".replace("-", "−"),
                 svg.bars(before.get(op, 0), after.get(op, 0), largest)) for op in chosen]  # fmt: skip

    changed, same = [op for op in names if change[op]], [op for op in names if not change[op]]
    headers = ("operator", "before", "after", "change", "")
    out = "<p>None changed.</p>"
    if changed:
        out = table(headers, rows(changed), (1, 2, 3), "operators that changed", kind="narrow")
    if same:
        alike = table(headers[:2], [row[:2] for row in rows(same)], (1,), "operators as before", kind="narrow")
        out += fold(many(len(same), "kind", " of operators as before"), alike)
    return LEGEND + out


def _medians(report: Report) -> list[tuple[str, str]]:
    """Latency before and after, by provider."""
    from normfuse.cli_bench import ms

    if report.latency is None or len(report.latency["models"]) != 2:
        return []
    a, b = (model["providers"] for model in report.latency["models"])
    return [(_joined(ms(a[p]["milliseconds"]["median"]), f"{ms(b[p]['milliseconds']['median'])} ms"),
             f"median latency, {text(p)}") for p in a if p in b]  # fmt: skip


def _files(report: Report) -> str:
    """What was measured of the files that one was chosen of."""
    from normfuse.cli_report import files_table

    if report.fastest is None:
        return ""
    found = files_table(report.fastest)
    rows = [[text(cell) for cell in row] for row in found.rows]
    words = "Median milliseconds, and in brackets their ratio to the model as it is, on inputs of these shapes."
    return (table([text(h) for h in found.headers], rows, range(1, len(found.headers) - 1), "files")
            + f'<p class="muted">{words}</p>')  # fmt: skip


def _latency(report: Report) -> str:
    """Latency and bandwidth, or how to get them."""
    return _files(report) + _before_and_now(report)


def _before_and_now(report: Report) -> str:
    if report.latency is not None:
        from normfuse.html import bench_page

        found, sides = report.latency, ("before", "now")
        rates = bench_page.bandwidth(found, sides)
        return (bench_page.verdicts(found, "the original", "the result") + bench_page.latency(found, sides)
                + (f"<h3>Bandwidth of the norms</h3>{rates}" if rates else "")
                + fold("The numbers", bench_page.numbers(found, sides)))  # fmt: skip
    if report.format != "onnx" or not report.source or not report.target or report.fastest is not None:
        return ""
    call = shlex.join(["normfuse", "bench", report.source, report.target])
    return (f"<p>Not measured: run <code>normfuse rewrite</code> with <code class=nb>--bench</code>, or</p>"
            f"<pre>{text(call, 4000)}</pre>")  # fmt: skip


LEGEND = '<p class="muted"><span class="key before"></span>before <span class="key after"></span>now</p>'


def _errors(report: Report) -> str:
    norms = [n for n in report.norms if n.error_before is not None and n.error_after is not None]
    if not norms:
        return ""
    old, new = [n.error_before for n in norms], [n.error_after for n in norms]
    worst_old, worst_new = max(v or 0 for v in old), max(v or 0 for v in new)
    words = (f"Each norm and its replacement were run on random and adversarial rows, in the model's own types and in "
             f"float64. The largest distance to float64 is {worst_new:.2f} units in the last place of the largest "
             f"element now; the model's own arithmetic had {worst_old:.2f}.")  # fmt: skip
    plot = svg.dots([("before", old), ("after", new)], "ulp", f"distance to float64 of {len(norms)} norms: at most "
                    f"{worst_old:.2f} before, {worst_new:.2f} now")  # fmt: skip
    return f'<p>{text(words)}</p>{LEGEND}{plot}'


# -- refusals --------------------------------------------------------------------------------------------------------


def _refusals(refusals: list[RefusalRecord]) -> str:
    groups: dict[str, list[RefusalRecord]] = {}
    for refusal in refusals:
        groups.setdefault(refusal.code, []).append(refusal)
    out: list[str] = []
    for code, found in sorted(groups.items()):
        entry = CODES.get(code)
        title = entry.title if entry else ""
        rows = [(name(r.node), text(r.message)) for r in found]
        told = f"<p>{text(entry.text)}</p><p><strong>What to change:</strong> {text(entry.fix)}</p>" if entry else ""
        body = told + table(("node", "the nearest miss"), rows, label=f"refused with {code}", most=MOST_REFUSED)
        out.append(fold(f"<strong>{text(code)}</strong> {text(title)} <span class=\"muted\">{len(found)}</span>", body,
                        len(out) < OPEN))  # fmt: skip
    return "\n".join(out)


# -- the end ---------------------------------------------------------------------------------------------------------


def _again(report: Report, old: FileFacts | None, new: FileFacts | None, command: str) -> str:
    from normfuse.cli_env import version

    out = ""
    if command or report.replay:
        out += f"<h3>Command</h3><pre>{text(command or report.replay, 4000)}</pre>"
    files: list[tuple[str, str]] = []
    for role, file in (("input", old), ("output", new)):
        if file is not None:
            beside = "".join(f"<br>{name(n)}, {size(b)}, weights beside it, not hashed" for n, b in file.data[:20])
            more = f"<br>and {len(file.data) - 20} more files" if len(file.data) > 20 else ""
            digest = f"SHA-256 <code>{file.digest}</code>"
            files.append((role, f"{name(file.name)}, {file.size:,} bytes<br>{digest}{beside}{more}"))
    if not new:
        files.append(("output", "nothing was written" if not report.target else text(report.target)))
    out += f"<h3>Files</h3>{items(files)}" if files and report.source else ""
    versions = [(p, text(v)) for p in PACKAGES if (v := version(p))]
    out += f"<h3>Versions</h3>{items(versions)}"
    if report.opset is not None:
        out += f'<p class="muted">ONNX opset {report.opset}</p>'
    if report.seconds:
        out += f"<h3>Seconds</h3>{items((text(k), f'{v:.3f}') for k, v in report.seconds.items())}"
    return out
