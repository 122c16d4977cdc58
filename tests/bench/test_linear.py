"""Rewriting and converting grow linearly with the model: ten times the layers take at most twelve times the time."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import normfuse
from tests.bench.common import turns
from tests.bench.llama_layers import cached_llama
from tests.bench.speed import fuse


@pytest.mark.slow
def test_linear_time(tmp_path: Path) -> None:
    few, many = cached_llama(8), cached_llama(80)
    target = tmp_path / "out.onnx"
    assert fuse(few, target, "off").fused == 17
    assert fuse(many, target, "off").fused == 161
    jobs = {"few": partial(fuse, few, target, "off"), "many": partial(fuse, many, target, "off")}
    seconds = turns(jobs, 3)
    assert min(seconds["many"]) <= 12 * min(seconds["few"]), seconds


def chain(layers: int) -> onnx.ModelProto:
    """Linear layers with norms between them."""
    lines = [f"m{i} = MatMul(y{i}, v{i}) a{i} = Add(m{i}, b{i}) y{i + 1} = LayerNormalization(a{i}, w{i}, c{i})"
             for i in range(layers)]  # fmt: skip
    head = '<ir_version: 9, opset_import: ["": 18]> g (float[2,8] y0) => (float[2,8] y)'
    made = onnx.parser.parse_model(f"{head} {{ {' '.join(lines)} y = Relu(y{layers}) }}")
    rng = np.random.default_rng(0)
    for node in made.graph.node:
        for name in node.input[1:]:
            shape = (8, 8) if name.startswith("v") else (8,)
            made.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    return made


@pytest.mark.slow
def test_linear_time_of_conversions() -> None:
    few, many = chain(40), chain(400)
    config = normfuse.Config(layernorm_to_rmsnorm="exact")
    assert [normfuse.optimize(m, config)[1].converted for m in (few, many)] == [40, 400]
    jobs = {name: partial(normfuse.optimize, m, config) for name, m in (("few", few), ("many", many))}
    seconds = turns(jobs, 3)
    assert min(seconds["many"]) <= 12 * min(seconds["few"]), seconds
