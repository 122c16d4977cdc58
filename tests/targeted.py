"""Models rewritten for a target, and the operators that they then have."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx

import normfuse
from tests.onnx_lines import layer, rms

SKIP = "SkipSimplifiedLayerNormalization"
SKIP_LAYER = "SkipLayerNormalization"
ADD = "s = Add(x, r) " + rms("s", "y")
ADD_LAYER = "s = Add(x, r) " + layer("s", "y")
CHOICES = [("ort-cpu", "1.29"), ("ort-cpu", "1.31"), ("ort-cuda", "1.31")]


def rewritten(made: onnx.ModelProto, folder: Path, target: str, version: str = "1.31", **config: Any,
              ) -> tuple[onnx.ModelProto, normfuse.Report]:  # fmt: skip
    """The rewrite of a model: valid, the same when made again, and not rewritten twice."""
    source, out, again = folder / "in.onnx", folder / "out.onnx", folder / "again.onnx"
    onnx.save(made, source)
    config |= {"ort_version": version} if target.startswith("ort-") else {}
    settings = normfuse.Config(target=target, **config)  # type: ignore[arg-type]
    report = normfuse.rewrite(source, out, settings, overwrite=True)
    onnx.checker.check_model(out, full_check=True)
    normfuse.rewrite(source, again, settings, overwrite=True)
    assert again.read_bytes() == out.read_bytes()
    assert normfuse.rewrite(out, again, settings, overwrite=True).fused == 0
    assert again.read_bytes() == out.read_bytes()
    return onnx.load(out), report


def operators(made: onnx.ModelProto) -> Counter[str]:
    """The operators of a model that are norms, and functions of NormFuse for norms."""
    return Counter(n.op_type for n in made.graph.node
                   if "Normalization" in n.op_type or (n.domain == "normfuse" and "softmax" not in n.op_type))
