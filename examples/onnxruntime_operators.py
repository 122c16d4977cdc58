"""NormFuse's operators in ONNX Runtime: a model for target "normfuse", by its bodies and by the library's kernels.

    python examples/onnxruntime_operators.py
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch

import normfuse
import normfuse.ort

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
from transformers import Gemma3ForCausalLM, Gemma3TextConfig


def export(path: Path) -> None:
    """A small Gemma 3 with random weights, its norms fused with the additions next to them."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, use_cache=False,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).train(False)
    report = normfuse.export(model, (torch.zeros(1, 32, dtype=torch.int64),), path, normfuse.Config(target="normfuse"),
                             input_names=["tokens"], verbose=False)  # fmt: skip
    print(f"{len(report.norms)} norms: {report.recipe}")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gemma3.onnx"
        export(path)
        calls = [node.op_type for node in onnx.load(path).graph.node if node.domain == "normfuse"]
        print(f"calls: {', '.join(f'{calls.count(name)} {name}' for name in dict.fromkeys(calls))}")
        feeds = {"tokens": np.arange(32, dtype=np.int64)[None]}
        bodies = ort.InferenceSession(path, providers=["CPUExecutionProvider"])  # any runtime can do this
        (expected,) = bodies.run(None, feeds)
        if normfuse.ort.library_path() is None:
            print("NormFuse was installed without a C compiler: the library is missing, the bodies did the work")
            return
        options = ort.SessionOptions()
        normfuse.ort.register(options, path)
        kernels = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (found,) = kernels.run(None, feeds)
        print(f"kernels ({normfuse.ort.instructions()}) against bodies: largest difference "
              f"{abs(found - expected).max():.1e}, largest value {abs(expected).max():.1e}")  # fmt: skip
        print("`normfuse bench model.onnx fused.onnx` tells what that gains")


if __name__ == "__main__":
    main()
