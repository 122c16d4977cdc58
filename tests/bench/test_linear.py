"""Rewriting grows linearly with the model: ten times the layers take at most twelve times the time."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

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
