"""Pretrained models of other exporters, where the packages that hold them are installed; none of them is imported."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest

import normfuse


def installed(package: str, path: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed")
    return Path(found.origin).parent / path


MAGIKA = "magika", "models/standard_v3_3/model.onnx"
SMART_TURN = "pipecat", "audio/turn/smart_turn/data/smart-turn-v3.2-cpu.onnx"
SILERO = "pipecat", "audio/vad/data/silero_vad.onnx"


@pytest.mark.parametrize("target", ["onnx", "normfuse"])
def test_magika_by_flax(target: Any, tmp_path: Path) -> None:
    """Its own variance loses most digits: the rewrite is measured against the norms in float64."""
    source, out = installed(*MAGIKA), tmp_path / "out.onnx"
    report = normfuse.rewrite(source, out, normfuse.Config(target=target, verify="model"))
    assert [(n.kind, n.size, n.action, n.verified) for n in report.norms] == [("layer_norm", 512, "fused", True)] * 2
    assert not report.refusals and report.nodes_after < 0.7 * report.nodes_before
    assert report.model_check is not None
    (output,) = report.model_check["outputs"]
    assert output["after"] < output["before"] / 10
    onnx.checker.check_model(out, full_check=True)


def test_smart_turn_a_quantized_whisper(tmp_path: Path) -> None:
    source = installed(*SMART_TURN)
    report = normfuse.rewrite(source, tmp_path / "out.onnx", normfuse.Config(target="normfuse", verify="model"))
    assert Counter((n.placement, n.emitted) for n in report.norms) == {
        ("pre", "function normfuse.bias_add_layer_norm"): 7, ("final", "function normfuse.bias_add_layer_norm"): 1,
        ("pre", ""): 1, ("latent", ""): 1}  # fmt: skip
    assert report.model_check is not None and report.model_check["equal"]
    card = normfuse.inspect(source).card
    assert card is not None
    (stack,) = card.stacks
    assert [card.formula(b) for b in stack.blocks[0].branches] == [
        "x + attention(LayerNorm(x))", "x + feed-forward(LayerNorm(x))"]  # fmt: skip
    assert stack.depth == 4 and len(stack.blocks) == 1


def test_silero_takes_means_and_has_no_norm() -> None:
    """Of tensors whose shape is not known, in the branches of an If: no root is taken of them."""
    report = normfuse.inspect(installed(*SILERO))
    assert not report.norms and not report.refusals
