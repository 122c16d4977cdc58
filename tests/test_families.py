"""Models of transformers, two layers each, through the ONNX door: every norm found and fused, in its place, equal."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest

import normfuse
from tests.families import FAMILIES, cached_export

RECIPES = {
    "llama": "RMSNorm, pre-norm",
    "qwen3": "RMSNorm, pre-norm, QK-norm per head",
    "deepseek_v3": "RMSNorm, pre-norm, latent norms",
    "gpt_oss": "RMSNorm, pre-norm",
    "gemma3": "RMSNorm, sandwich, QK-norm per head",
    "olmo2": "RMSNorm, post-norm inside the residual, QK-norm over the full width",
    "gpt2": "LayerNorm, pre-norm",
    "bert": "LayerNorm, post-norm after the residual, embedding norm",
    "bloom": "LayerNorm, pre-norm, embedding norm",
}


@pytest.mark.parametrize(("opset", "optimize"), [(18, True), (23, True), (18, False), (23, False)])
@pytest.mark.parametrize("name", FAMILIES)
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
