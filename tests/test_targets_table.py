"""The table of targets: what it says is what was measured, and which row a version gets."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import onnx
import pytest

import normfuse
from normfuse import targets
from normfuse.errors import InputError, UnsupportedError
from normfuse.targets import ROWS, WIDE, Row
from tests.bench.forms import RESULT, SHAPES
from tests.onnx_lines import model
from tests.targeted import ADD, rewritten


def measured(row: Row) -> list[dict[str, Any]]:
    """The measurements that a row of the CPU speaks of."""
    versions = json.loads(RESULT.read_text())["versions"]
    return [found for version, rows in versions.items() for found in rows
            if row.since <= tuple(map(int, version.split(".")[:2])) < row.before
            and found["kind"] == row.kind and found["type"] in row.types]  # fmt: skip


def ratio(found: dict[str, Any], a: str, b: str) -> float:
    """The time of a form in parts of another's."""
    return float(found["forms"][a]["us"] / found["forms"][b]["us"])


CPU = [row for row in ROWS if row.target == "ort-cpu" and row.form != "refuse"
       and row.what not in ("conversion", "half", "masked", "scaled", "sum", "convolved")]  # fmt: skip


def gains(row: Row) -> list[float]:
    """The time of an RMSNorm in parts of that of a LayerNorm, both with their addition, by version, type and shape."""
    out = []
    for found in json.loads(RESULT.read_text())["versions"].items():
        if row.since <= tuple(map(int, found[0].split(".")[:2])) < row.before:
            us = {(f["kind"], f["type"], f["rows"], f["n"]): f["forms"]["add, norm"]["us"] for f in found[1]}
            out += [us["rms_norm", *key[1:]] / us[key] for key in us if key[0] == "layer_norm"]
    return out


@pytest.mark.parametrize("row", [row for row in ROWS if row.what == "conversion"], ids=lambda row: row.range)
def test_a_conversion_pays_where_it_was_measured_to(row: Row) -> None:
    found = gains(row)
    assert len(found) >= 4 * len(SHAPES)
    middle = statistics.median(found)
    assert middle < 0.8 if row.form == "operator" else middle > 0.9
    assert f"{min(found):.2g}"[:4] in row.evidence
    assert f"{max(found):.2f}" in row.evidence


def test_a_conversion_that_gains_nothing_is_left_unless_it_is_forced(tmp_path: Path) -> None:
    from tests.test_centring import onnx_net

    source = onnx_net(tmp_path / "in.onnx")
    for version, force, converted in (("1.26", False, 0), ("1.26", True, 1), ("1.31", False, 1)):
        config = normfuse.Config(layernorm_to_rmsnorm="exact", target="ort-cpu", ort_version=version, force=force)
        report = normfuse.optimize(source, config)[1]
        assert report.converted == converted
        assert converted or [r.code for r in report.refusals] == ["NF306"]


@pytest.mark.parametrize("row", CPU, ids=lambda row: f"{row.kind} {row.what} {row.form} {row.range}")
def test_the_rows_are_what_was_measured(row: Row) -> None:
    """The form that a row gives is the fastest over the shapes among those that are as exact as the model."""
    found = measured(row)
    assert len(found) >= len(SHAPES)

    def middle(a: str, b: str) -> float:
        return statistics.median(ratio(f, a, b) for f in found)

    error = max(f["forms"]["add, norm"]["error"] / f["forms"]["spelled out"]["error"] for f in found)
    if row.form == "skip":
        assert middle("skip", "add, norm") < 0.95
    elif row.what == "skip":
        form, alike = "apart" if "float16" in row.types else "add, norm", [r for r in CPU if r.evidence == row.evidence]
        slower = [ratio(f, "skip", form) for r in alike for f in measured(r)]
        assert f"{min(slower):.2g} to {max(slower):.2g} times" in row.evidence and statistics.median(slower) > 1.5
        assert all(f["forms"][form]["error"] <= f["forms"]["skip"]["error"] for r in alike for f in measured(r))
    elif row.form == "leave":
        assert error > 100 or middle("spelled out", "add, norm") < 0.95
    elif row.since == (1, 30):
        assert middle("spelled out", "add, norm") > 1.5 and middle("skip", "add, norm") > 1.1 and error < 20
    else:
        assert middle("spelled out", "add, norm") > 0.9


def test_operators_in_float32_pay_where_they_were_measured_to() -> None:
    found = [o for ops in json.loads(RESULT.read_text())["operators"].values() for o in ops]
    assert {o["operator"] for o in found} == set(WIDE)
    ratios = [o["float32 us"] / o["us"] for o in found]
    rows = {(row.target, row.kind): row for row in ROWS if row.what == "half"}
    assert set(rows) == {(target, op) for target in ("ort-cpu", "onnx", "normfuse") for op in WIDE}
    for row in (row for row in rows.values() if row.form != "function"):
        assert f"{min(ratios):.2f} to {max(ratios):.2f} of the time" in row.evidence and max(ratios) < 1


def test_sums_pay_where_they_were_measured_to() -> None:
    found = [o["Sum us"] / o["Add us"] for o in json.loads(RESULT.read_text())["sums"]["1.31.1"]]
    (row,) = (row for row in ROWS if row.what == "sum")
    assert f"{min(found):.2f} to {max(found):.2f} of the time" in row.evidence and len(found) == len(SHAPES)


def test_scales_pay_where_they_were_measured_to() -> None:
    versions = json.loads(RESULT.read_text())["scales"]
    found = [(o["tokens"], o["FusedMatMul us"] / o["MatMul, Mul us"]) for v in versions.values() for o in v]
    ratios, (row,) = [ratio for _, ratio in found], (row for row in ROWS if row.what == "scaled")
    assert f"{min(ratios):.2f} to {max(ratios):.2f} of the time" in row.evidence
    assert f"with 512 tokens at most {max(r for n, r in found if n == 512):.2f}" in row.evidence
    assert {targets.runtime_version(v) for v in versions} == {(1, minor) for minor in range(20, 33)}


def test_constants_behind_convolutions_pay_where_they_were_measured_to() -> None:
    versions = json.loads(RESULT.read_text())["convolutions"]
    ratios = [o["taken in us"] / o["one number us"] for found in versions.values() for o in found]
    rows = [row for row in ROWS if row.what == "convolved"]
    assert [row.target for row in rows] == ["onnx", "ort-cpu", "normfuse"] and max(ratios) < 1
    assert all(f"{min(ratios):.2f} to {max(ratios):.2f} of the time" in row.evidence for row in rows)
    assert {targets.runtime_version(v) for v in versions} == {(1, minor) for minor in range(20, 33)}


def test_softmaxes_pay_where_they_were_measured_to() -> None:
    amd, intel = (json.loads((RESULT.parent / name).read_text())["chains"]
                  for name in ("softmax.json", "softmax-intel.json"))  # fmt: skip

    def span(found: list[dict[str, Any]], *masks: str, dtype: str) -> str:
        ratios = [c["ratio"] for c in found if c["type"] == dtype and c["mask"] in masks]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    rows = {row.what: row.evidence for row in ROWS if row.form == "function"}
    (told,) = (row.evidence for row in ROWS if row.what == "masked" and row.form == "leave")
    for evidence, of in ((rows["masked"], "of the time of Add and Softmax"), (told, "of the time")):
        assert f"{span(intel, 'causal', dtype='float32')} {of} under a causal mask with AVX-512" in evidence
        assert f"{span(amd, 'causal', dtype='float32')} with AVX2" in evidence
    assert f"{span(amd + intel, 'none', dtype='float32')} where the mask is 0" in rows["masked"]
    assert f"{span(amd + intel, 'causal', 'none', 'without', dtype='float16')} of the time of its parts" in rows["half"]


def test_our_operators_against_the_skip_operators() -> None:
    chains = json.loads((RESULT.parent / "ort-ops.json").read_text())["chains"]
    found = [c["ms"].get("normfuse, unrounded", c["ms"]["normfuse"]) / time for c in chains
             if (c["rows"], c["size"]) == (512, 2048) for form, time in c["ms"].items() if form.startswith("Skip")]
    (evidence,) = {row.evidence for row in ROWS if row.target == "normfuse" and row.what == "skip"}
    assert f"{min(found):.2f} to {max(found):.2f} of the time" in evidence


def test_every_row_says_how_it_is_known() -> None:
    assert all(row.evidence.startswith(("measured", "tried", "cited")) for row in ROWS)
    assert {row.form for row in ROWS} <= {"operator", "skip", "leave", "apart", "float32", "function", "product",
                                       "refuse", "sum", "taken in"}  # fmt: skip


@pytest.mark.parametrize("text", ["new", "1", "1.x", "31"])
def test_a_version_that_is_none(text: str, tmp_path: Path) -> None:
    onnx.save(model(ADD, "y s"), tmp_path / "in.onnx")
    with pytest.raises(InputError, match="is not a version"):
        config = normfuse.Config(target="ort-cpu", ort_version=text)
        normfuse.rewrite(tmp_path / "in.onnx", tmp_path / "out.onnx", config)
    assert not (tmp_path / "out.onnx").exists()


def test_a_version_that_is_too_old(tmp_path: Path) -> None:
    onnx.save(model(ADD, "y s"), tmp_path / "in.onnx")
    old = normfuse.Config(target="ort-cpu", ort_version="1.19.2")
    with pytest.raises(UnsupportedError, match=r"1.19 is older .* 1.20; use target 'onnx'"):
        normfuse.rewrite(tmp_path / "in.onnx", tmp_path / "out.onnx", old)
    assert not (tmp_path / "out.onnx").exists()
    normfuse.rewrite(tmp_path / "in.onnx", tmp_path / "out.onnx", normfuse.Config())


def test_a_version_newer_than_measured(tmp_path: Path) -> None:
    _, report = rewritten(model(ADD, "y s"), tmp_path, "ort-cpu", "1.99")
    assert "1.99 on CPU, newer than 1.32, the newest measured" in report.notes[0]


def test_the_installed_version(tmp_path: Path) -> None:
    import onnxruntime

    found = targets.runtime_version("")
    assert ".".join(map(str, found)) == ".".join(onnxruntime.__version__.split(".")[:2])
