"""The main job on two real models: rewrite, then compare outputs and speed in ONNX Runtime.

    python examples/demo.py [--out DIR]

1. The recogniser of PP-OCRv4, a pretrained model that the package rapidocr-onnxruntime holds.
2. A Llama of transformers' own class with random weights, exported by `torch.onnx.export`.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import onnxruntime as ort

from normfuse.cli import main as normfuse

OCR = "models/ch_PP-OCRv4_rec_infer.onnx"
RUNS = 40


def ocr_model(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """The text recogniser of PP-OCRv4, found without importing the package that holds it."""
    spec = importlib.util.find_spec("rapidocr_onnxruntime")
    if spec is None or spec.origin is None:
        raise SystemExit("the demo needs the package rapidocr-onnxruntime (install it with --no-deps), or `make demo`")
    image = np.random.default_rng(0).uniform(-1, 1, (1, 3, 48, 320)).astype(np.float32)
    return Path(shutil.copy(Path(spec.origin).parent / OCR, folder)), {"x": image}


def llama_model(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A small Llama with random weights at opset 23, as the exporter writes it before it optimizes on its own."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=1000, use_cache=False,
    )  # fmt: skip
    tokens = torch.randint(0, config.vocab_size, (1, 64))
    path = folder / "llama.onnx"
    print("Exporting with torch.onnx.export ...\n", flush=True)
    torch.onnx.export(
        LlamaForCausalLM(config).train(False), (tokens,), path,
        input_names=["tokens"], output_names=["logits"], opset_version=23, dynamo=True, optimize=False,
        verbose=False, external_data=False,
    )  # fmt: skip
    return path, {"tokens": tokens.numpy()}


def session(path: Path) -> ort.InferenceSession:
    """A session on one thread of the CPU: the spinning threads of two sessions would disturb each other."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def compare(before: ort.InferenceSession, after: ort.InferenceSession, inputs: dict[str, np.ndarray]) -> None:
    """Print the largest difference of each output."""
    pairs = zip(before.get_outputs(), before.run(None, inputs), after.run(None, inputs), strict=True)
    for output, old, new in pairs:
        error = np.abs(old.astype(np.float64) - new)
        print(f"output {output.name} {list(old.shape)}: largest difference {error.max():.2e}, "
              f"largest value {np.abs(old).max():.2e}")  # fmt: skip


def race(before: ort.InferenceSession, after: ort.InferenceSession, inputs: dict[str, np.ndarray]) -> None:
    """Print the latency of both, from runs that take turns, so that a busy machine disturbs both alike."""
    times: dict[ort.InferenceSession, list[float]] = {before: [], after: []}
    for i in range(RUNS):
        for one in (before, after) if i % 2 else (after, before):
            started = time.perf_counter()
            one.run(None, inputs)
            times[one].append((time.perf_counter() - started) * 1e3)
    for name, runs in (("before", times[before]), ("after", times[after])):
        low, middle, high = statistics.quantiles(runs[4:], n=4)
        print(f"latency {name:6} {middle:7.2f} ms  (half of the runs between {low:.2f} and {high:.2f})")
    ratios = [new / old for old, new in zip(times[before][4:], times[after][4:], strict=True)]
    print(f"after / before: {statistics.median(ratios):.3f}, the median over {len(ratios)} pairs of runs")


def heading(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}\n", flush=True)


def show(path: Path, inputs: dict[str, np.ndarray]) -> None:
    """Rewrite one model and print what came of it."""
    output = path.with_suffix(".fused.onnx")
    print(f"$ normfuse rewrite {path.name} {output.name}\n", flush=True)
    code = normfuse(["rewrite", str(path), str(output), "--overwrite"])
    if code:
        raise SystemExit(f"normfuse rewrite failed on {path} with exit code {code}")
    print("\nIn ONNX Runtime, on random inputs:")
    before, after = session(path), session(output)
    compare(before, after, inputs)
    race(before, after, inputs)


def run(folder: Path) -> None:
    """Both models."""
    heading("1. A pretrained model: the PP-OCRv4 text recogniser")
    show(*ocr_model(folder))
    heading("2. An export of one's own: Llama from transformers, 4 layers, random weights")
    show(*llama_model(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the models (a temporary one)")
    out = parser.parse_args().out
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        run(out)
        print(f"\nThe models are in {out}")
        return
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder))


if __name__ == "__main__":
    main()
