"""Models of transformers, two layers each, through the ONNX door: every norm found and fused, in its place, equal."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest

import normfuse
from normfuse.verify import compare_models
from tests.families import FAMILIES, RECIPES, cached, cached_export, digest, export_onnx, often
from tests.share import share



@pytest.mark.parametrize(("name", "opset", "optimize"), [
    pytest.param(name, *form, marks=() if often(name, *form) else pytest.mark.slow)
    for name in FAMILIES for form in ((18, True), (23, True), (18, False), (23, False))
])  # fmt: skip
def test_family(name: str, opset: int, optimize: bool, tmp_path: Path) -> None:
    family = FAMILIES[name]
    source, target = cached_export(name, opset, optimize=optimize), tmp_path / "out.onnx"
    report = normfuse.rewrite(source, target, normfuse.Config(verify="model"))
    assert len(report.norms) == family.norms
    assert dict(Counter(n.placement for n in report.norms)) == family.placements
    assert all(n.action in ("fused", "kept") for n in report.norms)
    assert all(n.verified for n in report.norms if n.action == "fused")
    assert report.model_check is None or report.model_check["equal"]
    assert report.recipe == RECIPES.get(name, report.recipe)
    assert not report.refusals
    model = onnx.load(target)
    onnx.checker.check_model(model, full_check=True)
    again = normfuse.rewrite(target, tmp_path / "again.onnx")
    assert not again.fused and len(again.norms) == family.norms
    assert (tmp_path / "again.onnx").read_bytes() == target.read_bytes()


@pytest.mark.parametrize(("name", "cast", "emitted"), share([
    ("llama", "float32, cast to float16 before the weight", "function normfuse.rms_norm"),
    ("t5", "float32, cast to float16 before the weight", "function normfuse.rms_norm"),
    ("gemma3", "float32, cast to float16 after the weight", "Cast, function normfuse.rms_norm, Cast"),
    ("olmo2", "float32, cast to float16 after the weight", "Cast, function normfuse.rms_norm, Cast"),
    ("cohere", "float32, cast to float16 after the weight", "Cast, LayerNormalization, Cast"),
], 2))  # fmt: skip
def test_half_precision_keeps_the_order_of_roundings(name: str, cast: str, emitted: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    source = cached(f"{name}-half-18-{digest(family)}.onnx",
                    lambda path: export_onnx(family.build().half(), family.args(), path, 18))  # fmt: skip
    report = normfuse.rewrite(source, tmp_path / "out.onnx")
    assert len(report.norms) == report.fused == family.norms and not report.refusals
    assert {n.cast for n in report.norms} == {cast} and {n.emitted for n in report.norms} == {emitted}
    (output,) = compare_models(source, tmp_path / "out.onnx")["outputs"]
    assert output["max_rel"] <= 2.0**-10
