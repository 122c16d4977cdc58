"""Near misses that broke other tools: each is refused, or rewritten to the same outputs. None may come out wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import normfuse
from tests.near_misses import CODES, NEAR_MISSES
from tests.spelling_files import session

INVALID = {"mean_variance_normalization": "onnx's own function body fails the full check"}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name: str, tmp_path: Path) -> None:
    case = NEAR_MISSES[name]
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(case.build(), source)
    report = normfuse.rewrite(source, target)
    fused = [n for n in report.norms if n.action == "fused"]
    assert case.equal_ok or all(n.emitted.endswith("_as_written") for n in fused), case.why
    assert not any(r.code == "NF201" for r in report.refusals), "verification had to save the recogniser"
    if name in CODES:
        assert CODES[name] in {r.code for r in report.refusals}
    if name not in INVALID:
        onnx.checker.check_model(str(target), full_check=True)
    feeds = case.inputs(np.random.default_rng(0))
    for want, got in zip(session(source).run(None, feeds), session(target).run(None, feeds), strict=True):
        assert want.shape == got.shape and want.dtype == got.dtype
        half = want.dtype == np.float16
        top = float(np.nanmax(np.abs(want.astype(np.float64)), initial=0.0))
        np.testing.assert_allclose(got.astype(np.float64), want.astype(np.float64), rtol=0, equal_nan=True,
                                   atol=(4e-3 if half else 4e-6) * top)  # fmt: skip
