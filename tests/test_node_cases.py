"""The expanded node tests of ONNX itself: the function bodies of LayerNormalization and RMSNormalization."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import normfuse
from tests.node_cases import expanded_cases
from tests.spelling_files import session

CASES = expanded_cases()


def test_all_are_there() -> None:
    assert len(CASES) == 57


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_node_case(case: tuple[str, onnx.ModelProto, dict[str, np.ndarray], dict[str, np.ndarray]],
                   tmp_path: Path) -> None:  # fmt: skip
    name, model, inputs, outputs = case
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(model, source)
    report = normfuse.rewrite(source, target)
    assert [n.kind for n in report.norms] == ["rms_norm" if "rms" in name else "layer_norm"]
    assert report.fused == 1 and report.norms[0].verified, report.refusals
    assert not {"ReduceMean", "Sqrt"} & {node.op_type for node in onnx.load(target).graph.node}
    onnx.checker.check_model(str(target), full_check=True)
    runtime = session(target)
    for info, got in zip(runtime.get_outputs(), runtime.run(None, inputs), strict=True):
        np.testing.assert_allclose(got, outputs[info.name], rtol=1e-4, atol=1e-5)
