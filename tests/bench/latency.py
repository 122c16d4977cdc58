"""Latency in ONNX Runtime on one thread of the CPU, before and after NormFuse, at realistic widths.

python -m tests.bench.latency [--only NAME ...] [--pairs 40] [--out FILE.json]

The runs take turns, first one then the other ahead; a ratio is that of a pair of runs. Below 1 is faster after.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

import normfuse
from tests.bench.common import save, table
from tests.families import FAMILIES, VOCABULARY, Family, export_onnx
from tests.node_cases import Arrays
from tests.test_spellings import session

HIDDEN, LAYERS, HEADS, BATCH = 1024, 4, 16, 1
SEQUENCES = (1, 128)
OCR = "models/ch_PP-OCRv4_rec_infer.onnx"
WARM = 4

_GATED = {
    "hidden_size": HIDDEN, "intermediate_size": 2816, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": 4, "max_position_embeddings": 256,
}  # fmt: skip
_PATTERN = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64}
WIDER: dict[str, dict[str, Any]] = {
    "llama": _GATED,
    "gemma3": {**_GATED, **_PATTERN, "head_dim": 64, "query_pre_attn_scalar": 64},
    "olmo2": _GATED,
    "gpt2": {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_inner": 4 * HIDDEN, "n_positions": 256},
}
EXPORTS: dict[str, tuple[tuple[str, int], ...]] = {
    "llama": (("dynamo", 18), ("dynamo", 23)),
    "gemma3": (("dynamo", 18), ("dynamo", 23)),
    "olmo2": (("dynamo", 18), ("dynamo", 23)),
    # Dynamo's exporter writes LayerNormalization itself, as does TorchScript's from opset 17.
    "gpt2": (("torchscript", 14), ("torchscript", 16)),
}


@dataclass(frozen=True)
class Job:
    """One model and its inputs."""

    name: str
    path: Path
    inputs: Arrays


def wide(name: str) -> Family:
    """A family at realistic width."""
    family = FAMILIES[name]
    return replace(family, options={**family.options, **WIDER[name]})


class _Masked(torch.nn.Module):
    """A model with its causal mask given: making one takes operators that the old exporter lacks."""

    def __init__(self, tokens: Any) -> None:
        super().__init__()
        self.model = tokens.model  # inside the wrapper that takes tokens only

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The logits."""
        length = tokens.shape[1]
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
        found: torch.Tensor = self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        return found


def torchscript(module: torch.nn.Module, tokens: torch.Tensor, path: Path, opset: int) -> None:
    """Export with the old exporter."""
    with torch.no_grad():
        torch.onnx.export(_Masked(module), (tokens,), str(path), dynamo=False, opset_version=opset, verbose=False)


def jobs(only: list[str], folder: Path) -> Iterator[Job]:
    """Every model, made as it is asked for."""
    for name, exports in EXPORTS.items():
        if only and name not in only:
            continue
        module = wide(name).build()
        for exporter, opset in exports:
            for length in SEQUENCES:
                tokens = torch.randint(3, VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(1))
                path = folder / "in.onnx"
                if exporter == "dynamo":
                    export_onnx(module, (tokens,), path, opset, optimize=False)
                else:
                    torchscript(module, tokens, path, opset)
                feeds: Arrays = {onnx.load(path).graph.input[0].name: tokens.numpy()}
                yield Job(f"{name}, {exporter} {opset}, seq {length}", path, feeds)
    found = importlib.util.find_spec("rapidocr_onnxruntime")
    if found is not None and found.origin is not None and (not only or "ocr" in only):
        image = np.random.default_rng(0).uniform(-1, 1, (1, 3, 48, 320)).astype(np.float32)
        yield Job("PP-OCRv4 recogniser", Path(found.origin).parent / OCR, {"x": image})


def race(job: Job, pairs: int, folder: Path) -> dict[str, Any]:
    """Run input and output in turns."""
    target = folder / "out.onnx"
    report = normfuse.rewrite(job.path, target, overwrite=True)
    before, after = session(job.path), session(target)
    old, new = before.run(None, job.inputs), after.run(None, job.inputs)
    error = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(old, new, strict=True))
    seconds: tuple[list[float], list[float]] = ([], [])
    gc.collect()
    for i in range(pairs + WARM):
        for side in (0, 1) if i % 2 else (1, 0):
            started = time.perf_counter()
            (before, after)[side].run(None, job.inputs)
            seconds[side].append((time.perf_counter() - started) * 1e3)
    low, middle, high = statistics.quantiles([b / a for a, b in zip(*(s[WARM:] for s in seconds), strict=True)], n=4)
    ms = [statistics.median(s[WARM:]) for s in seconds]
    return {
        "name": job.name,
        "norms": len(report.norms),
        "fused": report.fused,
        "nodes": [report.nodes_before, report.nodes_after],
        "emitted": sorted({n.emitted for n in report.norms if n.emitted}),
        "error": float(f"{error:.2g}"),
        "pairs": pairs,
        "before_ms": round(ms[0], 3),
        "after_ms": round(ms[1], 3),
        "min_ms": [round(min(s[WARM:]), 3) for s in seconds],
        "ratio": round(middle, 4),
        "quartiles": [round(low, 4), round(high, 4)],
    }


def row(found: dict[str, Any]) -> list[object]:
    """One line of the table."""
    low, high = found["quartiles"]
    words = "faster" if high < 1 else "slower" if low > 1 else "same"
    return [
        found["name"], f"{found['fused']}/{found['norms']}", "{} > {}".format(*found["nodes"]),
        f"{found['before_ms']:.2f}", f"{found['after_ms']:.2f}", f"{found['ratio']:.3f}", f"{low:.3f}..{high:.3f}",
        words, f"{found['error']:.1e}",
    ]  # fmt: skip


def main() -> None:
    """Measure, print, and write the result if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], choices=[*EXPORTS, "ocr"])
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs(given.only, Path(folder)):
            results.append(race(job, given.pairs, Path(folder)))
            print(*row(results[-1]), flush=True)
    head = ["model", "fused", "nodes", "before ms", "after ms", "ratio", "quartiles", "", "error"]
    print("\n" + table(head, [row(r) for r in results]))
    shapes = {"hidden": HIDDEN, "layers": LAYERS, "batch": BATCH, "threads": 1, "type": "float32"}
    save(given.out, {"shapes": shapes, "models": results})


if __name__ == "__main__":
    main()
