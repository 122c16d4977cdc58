"""Files as other tools leave them, and what other tools make of ours (docs/targets.md, "With quantizers")."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import version_converter

import normfuse
from normfuse.sessions import session
from tests.onnx_texts import ROOT, check, model, numbers

HALF, SINGLE = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
EVERY: tuple[Any, ...] = ("onnx", "normfuse", "ort-cpu", "ort-cuda")


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize(("held", "said"), [(np.float32, HALF), (np.float16, SINGLE)])
def test_a_weight_has_the_type_that_it_has(held: Any, said: int, target: str, tmp_path: Path) -> None:
    """Not the one that a value_info states, as ONNX Runtime's converter to float16 leaves it for the weights of
    operators that stay in float32."""
    lines = "s = Add(p, q) x = Cast<to=1>(s) v = Cast<to=1>(w) " + ROOT.format("x")
    lines += "d = Div(x, r) n = Mul(d, v) y = Cast<to=10>(n)"
    made = model("float16[B,8] p, float16[B,8] q", lines, "float16[B,8] y", 23, w=numbers(8).astype(held))
    made.graph.value_info.append(onnx.helper.make_tensor_value_info("w", said, [8]))
    feeds = {name: numbers(3, 8).astype(np.float16) for name in "pq"}
    done = check(made, [feeds], tmp_path, 1, target)
    skips = sum(node.op_type == "SkipSimplifiedLayerNormalization" for node in done.graph.node)
    assert skips == (target == "ort-cuda" and held == np.float16)  # which takes a weight of x's type


@pytest.mark.parametrize("target", EVERY)
def test_a_norm_whose_weight_is_said_to_be_of_another_type(target: str, tmp_path: Path) -> None:
    made = model("float[B,16] x", ROOT.format("x") + "n = Div(x, r) y = Mul(n, w)", w=numbers(16))
    made.graph.value_info.append(onnx.helper.make_tensor_value_info("w", HALF, [16]))
    check(made, [{"x": numbers(3, 16)}], tmp_path, 1, target)


def test_functions_that_a_tool_dropped(tmp_path: Path) -> None:
    """onnx.version_converter does so without a word; the file does not run, and says why nothing is found in it."""
    norm = ROOT.format("x") + "n = Div(x, r) y = Mul(n, w)"
    onnx.save(model("float[B,16] x", norm, w=numbers(16)), tmp_path / "in.onnx")
    report = normfuse.rewrite(tmp_path / "in.onnx", tmp_path / "fused.onnx")
    assert report.fused == 1 and not any("does not define" in note for note in report.notes)
    fused = onnx.load(tmp_path / "fused.onnx")
    assert not any("does not define" in note for note in normfuse.inspect(fused).notes)
    dropped = version_converter.convert_version(fused, 20)
    assert not dropped.functions
    onnx.save(dropped, tmp_path / "dropped.onnx")
    with pytest.raises(Exception, match="rms_norm"):
        session(tmp_path / "dropped.onnx")
    for report in (normfuse.inspect(tmp_path / "dropped.onnx"),
                   normfuse.rewrite(tmp_path / "dropped.onnx", tmp_path / "again.onnx")):  # fmt: skip
        assert [note for note in report.notes if "calls normfuse.rms_norm and does not define it" in note]
