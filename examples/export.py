"""A transformers model to an ONNX file with its norms fused, in one call, and a run of it in ONNX Runtime.

    python examples/export.py
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import onnxruntime as ort
import torch

import normfuse

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
from transformers import Qwen3Config, Qwen3ForCausalLM


def main() -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, use_cache=False, pad_token_id=0,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).train(False)
    tokens = torch.randint(0, 1000, (2, 16))
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "qwen3.onnx"
        report = normfuse.export(
            model, (tokens,), path, normfuse.Config(verify="model"), opset_version=18,
            input_names=["tokens"], output_names=["logits"], dynamic_shapes=({0: batch, 1: sequence},), verbose=False,
        )  # fmt: skip
        print(f"{len(report.norms)} norms ({report.recipe}), {report.fused} fused; "
              f"operators {report.nodes_before} -> {report.nodes_after}")  # fmt: skip
        assert report.model_check is not None
        print(f"the export before and after, in ONNX Runtime: equal {report.model_check['equal']}")

        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        for shape in ((2, 16), (1, 5)):
            tokens = torch.randint(0, 1000, shape)
            with torch.no_grad():
                expected = model(input_ids=tokens).logits.numpy()
            (logits,) = session.run(["logits"], {"tokens": tokens.numpy()})
            print(f"tokens {shape[0]}x{shape[1]}: largest difference to torch {abs(logits - expected).max():.1e}, "
                  f"largest logit {abs(expected).max():.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
