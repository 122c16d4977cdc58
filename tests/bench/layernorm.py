"""What turning LayerNorm into RMSNorm gains, or costs, on the CPU: single norms, and whole models before and after.

python -m tests.bench.layernorm [--out FILE.json] [--quick] [--models]

Norms: chains of 12 residual norms in ONNX Runtime, LayerNormalization against RMSNormalization (bias folded away),
RMSNormalization and an Add (bias kept), and the model-local function that stands for it below opset 23; in torch,
eager, F.layer_norm against F.rms_norm with and without a bias. Models: exported by torch, as they are and after
`layernorm_to_rmsnorm="exact"`, in ONNX Runtime at opset 23 and 18, and as modules in torch, eager and by Inductor; all
on one thread, and the clock counts processor time.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from onnx import TensorProto, helper, numpy_helper

import normfuse
from tests.bench.common import ROOT, save, table, turns
from tests.layernorm_models import Wrapped, offset, to_onnx

RESULT = ROOT / "tests/bench/results/layernorm.json"
CHAIN = 12
SHAPES = ((1, 768), (16, 768), (128, 768), (512, 1024))
FORMS = ("LayerNormalization", "RMSNormalization", "RMSNormalization, Add", "function", "function, Add")
TORCH = ("F.layer_norm", "F.rms_norm", "F.rms_norm, add")
EXACT = normfuse.Config(layernorm_to_rmsnorm="exact")


def session(path: str | bytes, threads: int) -> ort.InferenceSession:
    """A session that does not spin between its turns."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def chain(form: str, n: int) -> bytes:
    """x + norm(x + norm(...)) in one form."""
    rng = np.random.default_rng(0)
    opset = 18 if "function" in form else 23
    nodes, tensors, s = [], [], "x"
    for i in range(CHAIN):
        w, b = ((rng.standard_normal(n) / 10 + k).astype(np.float32) for k in (1, 0))
        tensors += [numpy_helper.from_array(w, f"w{i}"), numpy_helper.from_array(b, f"b{i}")]
        layer = form == "LayerNormalization"
        name = "RMSNormalization" if form.startswith("RMS") else "LayerNormalization"
        inputs = [s, f"w{i}", f"b{i}"] if layer else [s, f"w{i}"]
        nodes.append(helper.make_node(name, inputs, [f"y{i}"], axis=-1, epsilon=1e-5))
        y = f"y{i}"
        if "Add" in form:
            nodes.append(helper.make_node("Add", [y, f"b{i}"], [f"z{i}"]))
            y = f"z{i}"
        nodes.append(helper.make_node("Add", [s, y], [f"s{i}"]))
        s = f"s{i}"
    values = [helper.make_tensor_value_info(v, TensorProto.FLOAT, [1, "rows", n]) for v in ("x", s)]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return spelled(model).SerializeToString() if "function" in form else bytes(model.SerializeToString())


def spelled(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with each norm as the function that NormFuse writes for an RMSNorm at this opset."""
    from normfuse.frontends.onnx_functions import function_for

    function = function_for("rms_norm", True, False, "float32", "float32", 18, 1e-5)
    proto = ir.to_proto(function)
    for node in model.graph.node:
        if node.op_type == "LayerNormalization":
            node.op_type, node.domain = proto.name, "normfuse"
            for attr in list(node.attribute):
                if attr.name == "axis":
                    node.attribute.remove(attr)
            node.attribute.append(helper.make_attribute("axes", [-1]))
    model.functions.append(proto)
    model.opset_import.append(helper.make_opsetid("normfuse", 1))
    return model


def norms(repeats: int) -> list[dict[str, Any]]:
    """Microseconds a norm (with its residual addition in ONNX Runtime)."""
    rows = []
    for m, n in SHAPES:
        x = np.random.default_rng(1).standard_normal((1, m, n)).astype(np.float32)
        sessions = {form: session(chain(form, n), 1) for form in FORMS}
        jobs: dict[str, Callable[[], object]] = {form: partial(s.run, None, {"x": x}) for form, s in sessions.items()}
        found = {k: statistics.median(v[3:]) / CHAIN * 1e6 for k, v in turns(jobs, repeats).items()}
        torch.set_num_threads(1)
        t, w, b = torch.from_numpy(x), torch.rand(n), torch.rand(n)
        jobs = {form: partial(eager, form, t, w, b) for form in TORCH}
        found |= {k: statistics.median(v[3:]) / CHAIN * 1e6 for k, v in turns(jobs, repeats).items()}
        rows.append({"rows": m, "n": n, "us": {k: round(v, 2) for k, v in found.items()}})
    return rows


def eager(form: str, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> None:
    """A chain's worth of norms in torch."""
    for _ in range(CHAIN):
        if form == "F.layer_norm":
            F.layer_norm(x, w.shape, w, b)
        else:
            y = F.rms_norm(x, w.shape, w, 1e-5)
            if form.endswith("add"):
                y = y + b


MODELS: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[], tuple[torch.Tensor, ...]]]] = {
    "GPT-2, 4 layers of 768, 1x64": (
        lambda: build("GPT2LMHeadModel", "GPT2Config", ("input_ids",), use_cache=False, n_layer=4, vocab_size=2000),
        lambda: (torch.randint(0, 2000, (1, 64)),)),
    "ViT, 4 layers of 768, 1x197": (
        lambda: build("ViTModel", "ViTConfig", ("pixel_values",), num_hidden_layers=4),
        lambda: (torch.randn(1, 3, 224, 224),)),
}  # fmt: skip


def build(kind: str, config: str, names: tuple[str, ...], use_cache: bool | None = None, **options: Any) -> Wrapped:
    """A class of transformers, at its own width."""
    more = {} if use_cache is None else {"use_cache": use_cache}
    made = getattr(transformers, kind)(getattr(transformers, config)(**options))
    return Wrapped(offset(made), names, "last_hidden_state" if kind == "ViTModel" else "", **more).eval()


def models(repeats: int, folder: Path) -> list[dict[str, Any]]:
    """Milliseconds of processor time, on one thread, of a whole model before and after."""
    rows: list[dict[str, Any]] = []
    for name, (make, inputs) in MODELS.items():
        torch.manual_seed(0)
        module, args = make(), inputs()
        for opset in (23, 18):
            source = folder / f"{len(rows)}.onnx"
            to_onnx(module, args, opset).save(source)
            out = source.with_suffix(".out.onnx")
            report = normfuse.rewrite(source, out, EXACT)
            sessions = {k: session(str(p), 1) for k, p in (("before", source), ("after", out))}
            feeds = {i.name: a.numpy() for i, a in zip(sessions["before"].get_inputs(), args, strict=True)}
            jobs: dict[str, Callable[[], object]] = {k: partial(s.run, None, feeds) for k, s in sessions.items()}
            seconds = turns(jobs, repeats, time.process_time)
            rows.append(row(name, f"ONNX Runtime, opset {opset}", report.converted, seconds))
        torch.set_num_threads(1)
        after, report = normfuse.optimize(module, EXACT, args=args)
        for how in ("eager", "inductor"):
            pair = {"before": copy.deepcopy(module), "after": after}
            if how == "inductor":
                pair = {k: torch.compile(m) for k, m in pair.items()}
            jobs = {k: partial(m, *args) for k, m in pair.items()}
            with torch.no_grad():
                rows.append(row(name, f"torch {how}", report.converted, turns(jobs, repeats, time.process_time)))
    return rows


def row(model: str, where: str, converted: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The medians of both and their ratio, and the ratio of the least times, which other jobs disturb less."""
    ms = {k: statistics.median(v[3:]) * 1e3 for k, v in seconds.items()}
    least = {k: min(v[3:]) for k, v in seconds.items()}
    return {"model": model, "where": where, "converted": converted, "ms": {k: round(v, 3) for k, v in ms.items()},
            "ratio": round(ms["after"] / ms["before"], 3), "least": round(least["after"] / least["before"], 3)}


def main() -> None:
    """Measure, print, and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--models", action="store_true", help="measure the models anew, and keep the norms of the file")
    given = parser.parse_args()
    repeats = 6 if given.quick else 43
    single = json.loads(given.out.read_text())["norms"] if given.models else norms(repeats)
    base = {**dict.fromkeys(FORMS, FORMS[0]), **dict.fromkeys(TORCH, TORCH[0])}
    cells = [[f"{r['rows']}x{r['n']}", *(f"{v:.1f} ({v / r['us'][base[k]]:.2f})" for k, v in r["us"].items())]
             for r in single]  # fmt: skip
    print(table(["shape", *FORMS, *TORCH], cells), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        whole = models(min(repeats, 33), Path(folder))
    cells = [[r["model"], r["where"], r["converted"], *(f"{v:.2f}" for v in r["ms"].values()), r["ratio"], r["least"]]
             for r in whole]  # fmt: skip
    print(table(["model", "where", "converted", "before, ms", "after, ms", "ratio", "of least"], cells, 2))
    save(given.out, {"norms": single, "models": whole})


if __name__ == "__main__":
    main()
