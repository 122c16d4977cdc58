"""Llama of any depth as ONNX, for timing: the graph grows with the layers, the weights stay small.

Run it to see the sizes: ``python tests/bench/llama_layers.py 8 32 80``.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.families import HIDDEN, VOCABULARY, Family, cached, digest, export_onnx

DEPTHS = (8, 32, 80)


def llama(layers: int) -> Family:
    """A Llama of ``layers`` layers; it holds two norms a layer and a final one."""
    return Family(
        f"llama_{layers}",
        "LlamaConfig",
        "LlamaForCausalLM",
        2 * layers + 1,
        {"pre": 2 * layers, "final": 1},
        {
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": 128,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "use_cache": False,
        },
    )


def export_llama(
    layers: int, path: str | os.PathLike[str], opset: int = 18, optimize: bool = False, dynamic: bool = False
) -> Path:
    """Write a Llama of ``layers`` layers at ``path``, as the exporter leaves it unless ``optimize``."""
    family = llama(layers)
    return export_onnx(family.build(), family.args(), path, opset, optimize, dynamic)


def cached_llama(layers: int, opset: int = 18, optimize: bool = False, dynamic: bool = False) -> Path:
    """The file of ``export_llama``, written once."""
    marks = ["optimized" if optimize else "", "dynamic" if dynamic else ""]
    label = "-".join([str(layers), str(opset), *filter(None, marks), digest(llama(layers))])

    def write(path: Path) -> None:
        export_llama(layers, path, opset, optimize, dynamic)

    return cached(f"llama-layers-{label}.onnx", write)


def main() -> None:
    """Print nodes, bytes and seconds for each depth given."""
    import onnx

    for layers in [int(word) for word in sys.argv[1:]] or DEPTHS:
        start = time.perf_counter()
        path = cached_llama(layers)
        seconds = time.perf_counter() - start
        model = onnx.load(path)
        nodes = len(model.graph.node) + sum(len(function.node) for function in model.functions)
        print(f"{layers} layers: {nodes} nodes, {path.stat().st_size} bytes, {seconds:.1f} s")


if __name__ == "__main__":
    main()
