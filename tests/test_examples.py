"""The examples run as they are shown, say nothing on stderr, and do what they promise."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("more", [[], pytest.param(["--plugin"], marks=pytest.mark.slow)])
def test_compile(more: list[str]) -> None:
    pytest.importorskip("transformers")
    argv = [sys.executable, str(EXAMPLES / "compile.py"), *more]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    losses = [(float(loss), float(gradient)) for loss, gradient in
              re.findall(r"loss (\S+), largest gradient (\S+)", done.stdout)]  # fmt: skip
    assert len(losses) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- output: examples/compile.py -->\n```\n(.*?)```", readme, re.DOTALL)
    assert shown is not None
    assert done.stdout.splitlines()[2:] == shown[1].splitlines()[2:]


def test_demo(tmp_path: Path) -> None:
    if importlib.util.find_spec("rapidocr_onnxruntime") is None:
        pytest.skip("the demo's model is in the package rapidocr-onnxruntime")
    pytest.importorskip("transformers")
    argv = [sys.executable, str(EXAMPLES / "demo.py"), "--out", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    line = r"found (\d+), fused (\d+), refused 0; operators (\d+) -> (\d+); verified (\d+)/\d+"
    totals = re.findall(line, done.stdout)
    assert [(found, fused, verified) for found, fused, _, _, verified in totals] == [("5", "5", "5"), ("9", "9", "9")]
    assert all(int(after) < int(before) for _, _, before, after, _ in totals)
    assert done.stdout.count("largest difference") == 2
    for error, value in re.findall(r"largest difference (\S+), largest value (\S+)", done.stdout):
        assert float(error) < 1e-5 * float(value)
    assert {p.name for p in tmp_path.glob("*.fused.onnx")} == {"llama.fused.onnx", "ch_PP-OCRv4_rec_infer.fused.onnx"}
