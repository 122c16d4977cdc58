"""The examples run as they are shown, say nothing on stderr, and do what they promise."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from torch._inductor.async_compile import AsyncCompile

EXAMPLES = Path(__file__).parents[1] / "examples"
SHOWN = re.compile(r"<!-- output: examples/compile.py -->\n```\n(.*?)```", re.DOTALL)


@pytest.mark.slow  # twenty kernels of Inductor
@pytest.mark.parametrize("more", [[], ["--plugin"]])
def test_compile(more: list[str], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    argv = [sys.executable, str(EXAMPLES / "compile.py"), *more]
    own = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=own)
    assert done.returncode == 0, done.stderr
    if more:  # a second time its code comes from the cache, and the plugin is not called
        again = subprocess.run(argv, capture_output=True, text=True, check=False, env=own)
        assert again.stdout.splitlines()[:2] == done.stdout.splitlines()[:2]
        assert again.returncode == 1 and "from an earlier run" in again.stderr
    losses = [(float(loss), float(gradient)) for loss, gradient in
              re.findall(r"loss (\S+), largest gradient (\S+)", done.stdout)]  # fmt: skip
    assert len(losses) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert done.stdout.splitlines()[2:] == shown()[2:]


@pytest.mark.slow
def test_compile_without_its_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed but for the numbers of the compiled model: the kernels of Inductor are not built."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *_: lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["compile.py"])
    from tests.compiling import uncached

    with uncached():
        runpy.run_path(str(EXAMPLES / "compile.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["eager:", "compiled:"] and lines[2:] == shown()[2:]


def shown() -> list[str]:
    """The lines that the README shows."""
    found = SHOWN.search((EXAMPLES.parent / "README.md").read_text(encoding="utf-8"))
    assert found is not None
    return found[1].splitlines()


def example(name: str, *argv: object) -> str:
    """What an example of transformers prints; it says nothing on stderr."""
    pytest.importorskip("transformers")
    path = EXAMPLES / f"{name}.py"
    done = subprocess.run([sys.executable, str(path), *map(str, argv)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.slow
def test_train() -> None:
    out = example("train", 6)
    found = [(float(a), float(b)) for a, b in re.findall(r"^ +\d+  (\S+)  (\S+)$", out, re.MULTILINE)]
    assert len(found) == 6 and all(a == pytest.approx(b, rel=1e-4) for a, b in found)
    assert found[-1][1] < found[0][1]
    assert "5 norms, 4 in fused operators:" in out and "normfuse.add_layer_norm" in out


@pytest.mark.slow  # exports and compiles, as others here do
def test_export() -> None:
    pytest.importorskip("onnxruntime")
    out = example("export")
    assert "9 norms (RMSNorm, pre-norm, QK-norm per head), 9 fused; operators" in out
    assert "equal True" in out
    found = re.findall(r"tokens (\S+): largest difference to torch (\S+), largest logit (\S+)", out)
    assert [shape for shape, *_ in found] == ["2x16", "1x5"]
    assert all(float(error) < 1e-5 * float(value) for _, error, value in found)


@pytest.mark.slow
def test_convert_exact() -> None:
    out = example("convert_exact")
    assert re.findall(r"(\S+): 7 of 7 LayerNorms converted; now 7 RMSNorm\n", out) == ["ViT", "GPT-2"]
    errors = [float(e) for e in re.findall(r"largest distance to float64 (\S+) of", out)]
    assert len(errors) == 4 and 0 < max(errors) < 1e-5


@pytest.mark.slow
def test_approximate() -> None:
    out = example("approximate")
    assert "4 of 5 LayerNorms: approximate, 1 of 5 LayerNorms: exact" in out
    found = re.search(r"hidden states off by (\S+); with the old biases by (\S+)", out)
    assert found is not None and 0 < 2 * float(found[1]) < float(found[2])
    new = re.search(r"the same tokens backwards: off by (\S+)", out)
    assert new is not None and 0 < float(new[1]) < 0.2


@pytest.mark.slow
def test_onnxruntime_operators() -> None:
    ort = pytest.importorskip("normfuse.ort")
    pytest.importorskip("onnxruntime")
    out = example("onnxruntime_operators")
    assert "25 norms: RMSNorm, sandwich, QK-norm per head" in out
    assert "1 rms_norm, 4 qk_norm, 4 add_softmax, 8 norm_add_norm" in out
    if ort.library_path() is None:
        assert "the library is missing" in out
        return
    found = re.search(r"largest difference (\S+), largest value (\S+)", out)
    assert found is not None and float(found[1]) < 1e-5 * float(found[2])


@pytest.mark.slow  # a minute of exports
def test_gallery(tmp_path: Path) -> None:
    path = tmp_path / "gallery.html"
    out = example("gallery", path)
    recipes = {"Llama": "pre-norm", "Qwen3": "QK-norm per head", "DeepseekV3": "latent norms", "GptOss": "pre-norm",
               "Gemma3": "sandwich", "Olmo2": "post-norm inside the residual", "GPT2": "LayerNorm"}  # fmt: skip
    lines = out.splitlines()
    shown = {name: lines[i + 1] for i, line in enumerate(lines) for name in recipes if f"/{name}.pt2: exported" in line}
    assert shown.keys() == recipes.keys() and all(recipe in shown[name] for name, recipe in recipes.items())
    page = path.read_text(encoding="utf-8")
    assert "How 7 models normalise" in page and page.count("<svg") >= 7


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
