"""Every spelling of the two norms, through every exporter: found, fused, nothing left behind, and right.

An output may be no further from float64 than the input graph's own was, give or take a few roundings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import normfuse
from normfuse.errors import UnsupportedError
from tests.spelling_files import BRAIN, EXPORTERS, HALF, REDUCTIONS, SINGLE, exported, marks, session
from tests.spellings import (
    CANNOT_EXPORT, LOSES_EPS, SPELLINGS, Exporter, Spelling, hostile_inputs, parameters, reference,
)  # fmt: skip

ULP = {SINGLE: 2.0**-23, HALF: 2.0**-10, BRAIN: 2.0**-7}

CASES = [
    pytest.param(exporter, opset, dtype, name, id=f"{exporter}-{opset}-{str(dtype)[6:]}-{name}",
                 marks=marks(exporter, dtype, i, opset))
    for exporter, opset in EXPORTERS
    for dtype in (SINGLE, HALF, *((BRAIN,) if (exporter, opset) == ("dynamo", 18) else ()))
    for i, name in enumerate(SPELLINGS)
    if name not in CANNOT_EXPORT[exporter, opset]
]  # fmt: skip


@pytest.mark.parametrize(("exporter", "opset", "dtype", "name"), CASES)
def test_spelling(exporter: Exporter, opset: int, dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    spelling = SPELLINGS[name]
    source, target = exported(exporter, opset, dtype, name), tmp_path / "out.onnx"
    report = normfuse.rewrite(source, target)
    if name in LOSES_EPS[exporter]:
        assert [refusal.code for refusal in report.refusals] == ["NF103"] and not report.norms
        return
    assert [norm.kind for norm in report.norms] == [spelling.kind]
    norm = report.norms[0]
    assert norm.action in ("fused", "kept"), report.refusals
    assert norm.action == "kept" or norm.verified
    assert norm.eps == pytest.approx(spelling.eps * spelling.prescale**2, rel=1e-5 if dtype == SINGLE else 0.05)
    model = onnx.load(target)
    assert not REDUCTIONS & {node.op_type for node in model.graph.node}
    onnx.checker.check_model(model, full_check=True)
    assert {i.domain: i.version for i in model.opset_import}[""] == opset
    if dtype != BRAIN:
        compare_runs(spelling, dtype, source, target)


def test_opsets_that_are_too_old_are_refused(tmp_path: Path) -> None:
    model = onnx.load(exported("torchscript", 9, SINGLE, "ln_functional"))
    model.opset_import[0].version = 8
    onnx.save(model, tmp_path / "old.onnx")
    with pytest.raises(UnsupportedError, match=r"opset 8 is older than 9; convert it with onnx\.version_converter"):
        normfuse.rewrite(tmp_path / "old.onnx", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_weights_that_are_inputs_as_the_oldest_files_have_them(tmp_path: Path) -> None:
    """Before version 4 of the format each initializer was an input as well, which nobody could give: so it stays."""
    source, target = tmp_path / "source.onnx", tmp_path / "target.onnx"
    model = onnx.load(exported("torchscript", 9, SINGLE, "ln_functional"))
    model.graph.input.extend(onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims))
                             for t in model.graph.initializer)  # fmt: skip
    model.ir_version = 3
    onnx.save(model, source)
    assert normfuse.rewrite(source, target, normfuse.Config(verify="model")).fused == 1
    compare_runs(SPELLINGS["ln_functional"], SINGLE, source, target)
    for made in map(session, (source, target)):
        assert [given.name for given in made.get_inputs()] == ["x"] and not made.get_overridable_initializers()


@pytest.mark.parametrize(("exporter", "opset", "name"), [
    ("dynamo", 18, "ln_channels_first_1d"), ("dynamo", 18, "rms_rounded_rstd"), ("dynamo", 18, "ln_centred_then_rms"),
    ("torchscript", 11, "ln_functional"), ("torchscript", 17, "ln_native"),
])  # fmt: skip
def test_fast_numerics_gives_an_operator_to_what_has_none(exporter: Exporter, opset: int, name: str,
                                                          tmp_path: Path) -> None:  # fmt: skip
    source, exact, fast = exported(exporter, opset, HALF, name), tmp_path / "exact.onnx", tmp_path / "fast.onnx"
    (norm,) = normfuse.rewrite(source, exact).norms
    assert norm.emitted.endswith("_as_written")
    (norm,) = normfuse.rewrite(source, fast, normfuse.Config(numerics="fast")).norms
    assert norm.action == "fused" and norm.verified and "Cast, " in norm.emitted
    compare_runs(SPELLINGS[name], HALF, source, fast)


@pytest.mark.parametrize(("config", "told"), [
    ({"target": "normfuse"}, True), ({"target": "normfuse", "numerics": "fast"}, False), ({"target": "onnx"}, False),
])  # fmt: skip
def test_norms_that_have_no_kernel_are_told(config: dict[str, Any], told: bool, tmp_path: Path) -> None:
    source = exported("dynamo", 18, HALF, "rms_rounded_rstd")
    report = normfuse.rewrite(source, tmp_path / "out.onnx", normfuse.Config(**config))
    assert any(note.startswith("1 norm rounds in an order of its own") for note in report.notes) == told


def compare_runs(spelling: Spelling, dtype: torch.dtype, source: Path, target: Path) -> None:
    """Both models in ONNX Runtime against float64, on inputs that are hard on norms."""
    before, after = session(source), session(target)
    for name, x in hostile_inputs(spelling.shape, dtype).items():
        if dtype == HALF and spelling.name == "ln_shifted_input" and name == "tiny":
            continue  # x + 0.5 loses a tiny x in float16; the runtime keeps it or not, as its own fusions fall
        feeds = {before.get_inputs()[0].name: x.numpy()}
        want = reference(spelling, x, *(p.to(dtype) for p in parameters())).numpy()
        old = np.abs(before.run(None, feeds)[0].astype(np.float64) - want).max()
        new = np.abs(after.run(None, feeds)[0].astype(np.float64) - want).max()
        allowed = 2 * old + 4 * ULP[dtype] * np.abs(want).max()
        assert new <= allowed or not np.isfinite(old), f"{name}: off by {new:.3g}, was {old:.3g}"
