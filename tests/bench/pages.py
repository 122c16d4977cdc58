"""The tables of README and docs that show measurements, written from the files in tests/bench/results.

python -m tests.bench.pages            writes the rows of each into its page, under the head that stands there
python -m tests.bench.pages --check    says which differ, and ends with 1 if any does; tests/test_readme.py asks as well
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

from tests.bench.common import ROOT
from tests.bench.latency import LIMIT, MAIN
from tests.families import FAMILIES

Rows = Iterable[list[object]]
KINDS = {"rms": "RMSNorm", "layer": "LayerNorm"}
SHOWN = [(1, 4096, 2), (128, 2048, 2), (512, 2048, 1), (512, 2048, 2)]
"""Of ort-ops.json, what README shows: rows, size, threads."""
OPERATORS = {"rms_norm": "norm", "add_rms_norm": "add, norm", "norm_add": "norm, add",
             "norm_add_norm": "norm, add, norm", "layer_norm": "LayerNorm", "add_layer_norm": "add, LayerNorm",
             "qk_norm": "query and key"}  # fmt: skip


def results(name: str) -> dict[str, Any]:
    """A file of measurements."""
    found: dict[str, Any] = json.loads((ROOT / "tests/bench/results" / f"{name}.json").read_text())
    return found


def peers() -> Rows:
    """How many spellings each tool recovers."""
    names = {"onnx node tests, expanded": "ONNX's own expanded node tests", "dynamo": "dynamo, opset",
             "torchscript": "TorchScript, opset"}  # fmt: skip
    for name, row in results("peers")["rows"].items():
        start, _, rest = name.partition(" ")
        label = names.get(name) or f"{names[start]} {rest}"
        tools = [row[t] for t in ("input", "onnxruntime", "ort python tool", "onnxsim", "onnxscript for ort")]
        cells = [f"{t['found']}" + (f" ({len(t['wrong'])})" if t["wrong"] else "") for t in tools]
        yield [label, row["cases"], *cells, f"**{row['normfuse']['found']}**"]


def pretrained() -> Rows:
    """The same for models that packages hold."""
    for name, row in results("pretrained")["models"].items():
        tools = [row[t] for t in ("input", "onnxruntime", "ort python tool", "onnxsim", "onnxscript for ort")]
        cells = ["fails" if t["norms"] < 0 else str(t["norms"]) + ("" if t["right"] else " (wrong)") for t in tools]
        yield [f"{name}, {row['package'].split('==')[0]}", row["exporter"], row["norms"], *cells,
               f"**{row['normfuse']['norms']}**", f"{row['before']}, {row['after']}"]  # fmt: skip


def ort_ops(every: bool, file: str = "ort-ops", threads: bool = True, digits: int = 2) -> Callable[[], Rows]:
    """Chains of additions and norms in ONNX Runtime."""

    def rows() -> Rows:
        for one in results(file)["chains"]:
            if not every and (one["rows"], one["size"], one["threads"]) not in SHOWN:
                continue
            stock = {k: v for k, v in one["ms"].items() if not k.startswith(("normfuse", "decomposed"))}
            best = min(stock, key=lambda name: stock[name])
            ms = [f"{t:.{digits}f}" for t in (one["ms"]["decomposed"], stock[best], one["ms"]["normfuse"])]
            ms[1] += f" ({best})"
            ratios = [f"{one[key]:.2f}" for key in ("to_best_stock", "to_decomposed")]
            name = f"{KINDS[one['norm']]} {one['type']}, {one['rows']}x{one['size']}"
            yield [name, *([one["threads"]] if threads else []), *ms, *ratios]

    return rows


def softmaxes() -> Rows:
    """Softmaxes in ONNX Runtime, on two machines."""
    for one, other in zip(results("softmax")["chains"], results("softmax-intel")["chains"], strict=True):
        ms = [f"{one['ms'][form]:.3f}" for form in ("ONNX Runtime", "normfuse")]
        assert all(one[key] == other[key] for key in ("mask", "shape", "type", "threads"))
        yield [one["mask"], "x".join(map(str, one["shape"])), one["type"], one["threads"], *ms,
               *(f"{found['ratio']:.2f}" for found in (one, other))]  # fmt: skip


def kernels(wanted: Callable[[dict[str, Any]], bool]) -> Callable[[], Rows]:
    """Kernels on a GPU, of which one line has forward and backward."""

    def rows() -> Rows:
        found: dict[tuple[str, int, int], dict[str, dict[str, dict[str, Any]]]] = {}
        for one in results("kernels")["results"]:
            if one["type"] == "bf16" and wanted(one):
                key = one["kind"], one["rows"], one["n"]
                found.setdefault(key, {}).setdefault(one["what"], {})[one["who"]] = one
        order = list(OPERATORS)
        for (kind, count, n), sides in sorted(found.items(), key=lambda i: order.index(i[0][0])):
            cells: list[object] = [f"{OPERATORS[kind]}, {count}x{n}"]
            for side in ("forward", "backward"):
                who = sides[side]
                others = {w: f["ms"] for w, f in who.items() if w not in ("copy", "normfuse", "eager")}
                best, mine = min(others, key=lambda w: others[w]), who["normfuse"]
                share = mine["share"] if "share" in mine else who["copy"]["ms"] / mine["ms"]
                cells += [f"{mine['ms'] * 1e3:.1f}", f"{share:.2f}", f"{mine['ms'] / others[best]:.2f} ({best})"]
            yield cells

    return rows


def models(file: str, compiling: bool) -> Callable[[], Rows]:
    """Whole models under torch.compile."""

    def rows() -> Rows:
        for one in results(file)["models"]:
            label = f"{one['model']}, {one['mode']}"
            cells = [f"{one['ms'][b]['median']:.2f}" for b in ("inductor", "normfuse")]
            cells.append(f"{one['ms_ratio']['median']:.3f}")
            if not compiling:
                # a row of operators that are left to Inductor since has a note that says so
                yield [label + (", with `qk_norm`" if "note" in one else ""), *cells]
                continue
            cells += [f"{one['compile_s'][b]['median']:.1f}" for b in ("inductor", "normfuse")]
            yield [label, f"{one['fused']}/{one['norms']}", *cells, f"{one['compile_s_ratio']['median']:.3f}"]

    return rows


def latency(file: str, columns: list[str], wanted: Callable[[str, str], bool], digits: int = 1,
            own: str = "") -> Callable[[], Rows]:  # fmt: skip
    """Latency in ONNX Runtime: the best of the others, and our ratios to it. With `own`, the rows in which this
    contender's file was another than that of `onnx`."""
    measured = results(file)

    def rows() -> Rows:
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for one in measured["models"]:
            times = one["results"]
            other = own in times and times[own]["ms"] != times["normfuse onnx"]["ms"]
            if wanted(one["model"], one["type"]) and (other or not own):
                found.setdefault((one["model"], one["type"]), []).append(one)
        place = {name: i for i, name in enumerate(FAMILIES)}
        for model, dtype in sorted(found, key=lambda key: (place.get(key[0], len(place)), key[1] != "fp32")):
            group = found[model, dtype]
            best = [min(r["ms"] for name, r in one["results"].items() if "normfuse" not in name) for one in group]
            label = model if dtype == "as published" else f"{model} {dtype}"
            if "ModuleNotFoundError" in measured["notes"][f"{model} {dtype}"].get("onnxsim", ""):
                label += " (without onnxsim)"
            ratios = [" / ".join(ratio(one, f"normfuse {name}") for one in group) for name in columns]
            yield [label, " / ".join(f"{ms:.{digits if ms >= 1 else 2}f}" for ms in best), *ratios]

    return rows


def ratio(one: dict[str, Any], name: str) -> str:
    """A ratio, with a star where it is above the limit by more than noise."""
    if name not in one["ratios"]:
        return "-"
    sure = one.get("intervals", {}).get(name, [0])[0] > LIMIT
    return f"{one['ratios'][name]:.3f}{'*' if sure else ''}"


def forms(kind: str) -> Callable[[], Rows]:
    """The forms of a residual norm by version of ONNX Runtime: times in parts of the exporter's, and errors."""

    def rows() -> Rows:
        for version, found in results("forms")["versions"].items():
            cells = [version]
            columns = [("add, norm", "float32"), ("skip", "float32"), ("add, norm", "float16"), ("skip", "float16"),
                       ("apart", "float16")]  # fmt: skip
            for form, dtype in columns:
                made = [one["forms"] for one in found if (one["kind"], one["type"]) == (kind, dtype)]
                parts = [f[form]["us"] / f["spelled out"]["us"] for f in made if form in f]
                cells.append(f"{min(parts):.2f} - {max(parts):.2f}" if parts else "not measured")
            floats = [one["forms"] for one in found if (one["kind"], one["type"]) == (kind, "float32")]
            errors = [max(f[form]["error"] for f in floats) for form in ("spelled out", "add, norm", "skip")]
            yield [*cells, " / ".join(f"{error:.0e}" for error in errors)]

    return rows


def layernorms() -> Rows:
    """Single norms, those that may stand for a LayerNorm beside it."""
    for one in results("layernorm")["norms"]:
        us, cells = one["us"], [f"{one['rows']}x{one['n']}"]
        for form, t in us.items():
            base = us["F.layer_norm" if form.startswith("F.") else "LayerNormalization"]
            cells.append(f"{t:.1f}" + (f" ({t / base:.2f})" if t != base else ""))
        yield [*cells]


def conversions() -> Rows:
    """Whole models before and after LayerNorm to RMSNorm."""
    for one in results("layernorm")["models"]:
        ms = [f"{one['ms'][side]:.1f}" for side in ("before", "after")]
        yield [one["model"], one["where"], one["converted"], *ms, f"{one['ratio']:.3f}"]


def runtimes() -> Rows:
    """Of how many families other runtimes run the files."""
    found = results("runtimes")
    names = {"openvino": "OpenVINO", "tvm": "TVM"}
    for runtime, version in found["versions"].items():
        for opset in (18, 23):
            rows = [row[runtime] for row in found["families"] if row["opset"] == opset]
            cells = [sum(isinstance(row[which], float) for row in rows)
                     for which in ("input", "onnx", "standard", "normfuse")]
            yield [f"{names.get(runtime, runtime)} {version}", opset, *cells]


def spellings() -> Rows:
    """What OpenVINO makes of them."""
    found = results("runtimes")["spellings"]
    for which, name in (("input", "as exported"), ("standard", "with `--target standard`")):
        yield [name, *(found[which][kind] for kind in ("RMS", "MVN", "parts"))]


def speed() -> Rows:
    """Seconds of each tool to optimise a file."""
    tools = ("onnx_ir load+save", "onnxruntime optimise+save", "normfuse, verify off", "normfuse, verify sites",
             "onnxsim simplify", "onnxscript optimize")  # fmt: skip
    for depth in results("speed")["depths"]:
        yield [depth["layers"], depth["nodes"], *(f"{depth['tools'][tool]['median']:.2f}" for tool in tools)]


LATENCY = ["onnx", "normfuse", "after onnxscript", "after onnxsim"]
NEWEST = ["onnx", "ort-cpu", *LATENCY[1:]]
PAGES: dict[str, list[tuple[str, Callable[[], Rows]]]] = {
    "README.md": [
        ("| export |", peers),
        ("| model | exporter |", pretrained),
        ("| norm, rows x size |", ort_ops(every=False)),
        ("| operator, rows x N |", kernels(lambda one: (one["rows"], one["n"]) in ((4096, 4096), (65536, 128)))),
        ("| model | inductor, ms | normfuse, ms | ratio |\n", models("models-cuda", compiling=False)),
        ("| model | best of the others, ms | `onnx` to it | `ort-cuda`",
         latency("latency-cuda", ["onnx", "ort-cuda", "normfuse", "after onnxscript"], lambda *_: True, digits=2)),
        ("| layers |", speed),
        ("| model | best of the others, ms | `onnx` to it | `ort-cpu`",
         latency("latency-intel", NEWEST, lambda model, dtype: model in MAIN or dtype == "as published")),
        ("| model | norms fused |", models("models-cpu", compiling=True)),
    ],
    "docs/torch.md": [
        ("| operator, rows x N |", kernels(lambda one: one["rows"] >= 4096)),
        ("| operator, rows x N |", kernels(lambda one: one["rows"] == 16)),
    ],
    "docs/targets.md": [
        ("| runtime |", runtimes), ("| spellings |", spellings),
        ("| ONNX Runtime |", forms("rms_norm")), ("| ONNX Runtime |", forms("layer_norm")),
    ],
    "docs/layernorm-to-rmsnorm.md": [("| rows x size |", layernorms), ("| model | where |", conversions)],
    "docs/latency.md": [
        ("| model |", latency("latency-intel", NEWEST,
                              lambda model, dtype: model not in MAIN and dtype != "as published")),
        ("| model |", latency("latency", LATENCY, lambda *_: True)),
        ("| model |", latency("latency", ["onnx", "ort-cpu", "after onnxscript"], lambda _, dtype: dtype == "fp16",
                              own="normfuse ort-cpu")),
        ("| model |", latency("latency-fastest", [*LATENCY, "fastest"], lambda *_: True)),
    ],
    "docs/onnxruntime.md": [
        ("| norm, rows x size | decomposed", ort_ops(True, "ort-ops-cuda", threads=False, digits=3)),
        ("| norm, rows x size | threads", ort_ops(every=True)),
        ("| mask | heads x queries x keys |", softmaxes),
    ],
}  # fmt: skip
"""By page, in the order in which they stand there, the start of a table's head and what its rows are."""


def filled(page: str, text: str) -> str:
    """The text of a page with the rows of its tables as the measurements have them."""
    start = 0
    for head, rows in PAGES[page]:
        found = text.find(head, start)
        assert found >= 0, f"{page}: no table that starts with {head!r}, or not in this order"
        start = text.index("\n", text.index("\n|---", found) + 1) + 1
        rest = text[start:].splitlines(keepends=True)
        end = start + sum(map(len, itertools.takewhile(lambda line: line.startswith("|"), rest)))
        lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows()]
        text = text[:start] + "".join(f"{line}\n" for line in lines) + text[end:]
    return text


def main() -> None:
    """Write or compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    differ = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        if (new := filled(page, text)) != text:
            differ.append(page)
            if not given.check:
                (ROOT / page).write_text(new, encoding="utf-8")
    print(("differ: " if given.check else "written: ") + (", ".join(differ) or "none"))
    sys.exit(bool(given.check and differ))


if __name__ == "__main__":
    main()
