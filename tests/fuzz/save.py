"""Keeps what failed: the description, the model and, where `normfuse.reduce` sees the fault too, the smallest model."""

from __future__ import annotations

import random
from pathlib import Path

import onnx

from normfuse.errors import NormFuseError
from tests.fuzz import check, to_fx, to_onnx
from tests.fuzz.generator import generate


def save(seed: int, folder: Path) -> str:
    """Write the graph of a seed to a folder; gives back what was written, in words."""
    from normfuse.reduce import reduce_model

    folder.mkdir(parents=True, exist_ok=True)
    program, config = generate(seed), check.config(seed, random.Random(seed * 2 + 1))
    (folder / f"{seed}.txt").write_text(f"{program}\n\n{config}\n\n{to_fx.write(program).graph}\n")
    model = to_onnx.write(program)
    onnx.save(model, folder / f"{seed}.onnx")
    try:
        done = reduce_model(model, config)
    except NormFuseError as why:
        return f"saved as {folder}/{seed}.onnx, not reduced: {why}"
    if done is None:
        return f"saved as {folder}/{seed}.onnx and .txt: normfuse.reduce sees nothing wrong in it"
    onnx.save(done[0], folder / f"{seed}.reduced.onnx")
    found = done[1]
    return (f"saved as {folder}/{seed}.reduced.onnx, {found.nodes_before} nodes made {found.nodes_after}: "
            f"{found.failure}: {found.message}")  # fmt: skip
