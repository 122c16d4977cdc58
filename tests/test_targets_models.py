"""Whole models on each target: equal, no further from float64, and running without our library."""

from __future__ import annotations

import importlib.util
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

import normfuse
from normfuse.ort import library_path
from normfuse.sessions import open_session, session
from tests.families import (
    FAMILIES, FUSED, LAYERS, MORE, OTHERS, cached, cached_export, digest, export_onnx,
)  # fmt: skip
from tests.share import share
from tests.targeted import CHOICES, SKIP, operators

PLACED = ("norm_add_norm", "norm_add", "qk_norm", "add_rms_norm", "add_layer_norm")


def softmaxes(model: onnx.ModelProto) -> tuple[int, int]:
    """How many operators are softmaxes of what an Add or a Where gives, and how many calls are softmaxes."""
    made_by = {out: node for node in model.graph.node for out in node.output}
    masked = [node for node in model.graph.node if node.op_type == "Softmax" and
              (made := made_by.get(node.input[0])) is not None and made.op_type in ("Add", "Where")]  # fmt: skip
    return len(masked), sum(node.domain == "normfuse" and "softmax" in node.op_type for node in model.graph.node)


def placed(name: str, kind: str) -> Counter[str]:
    """The operators with a neighbour that a family gets."""
    layers = FUSED.get(name) or OTHERS[kind]
    return Counter({op: n * LAYERS for op, n in layers.items()}) + MORE.get(name, Counter())


@pytest.mark.parametrize(("target", "version"), [*CHOICES, ("standard", ""), ("normfuse", "")])
@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, target: str, version: str, tmp_path: Path) -> None:
    family, source, out = FAMILIES[name], cached_export(name, 18), tmp_path / "out.onnx"
    # what differs between the runtimes are the operators, and ort-cuda has those of ort-cpu before 1.30
    verify = "sites" if target == "ort-cuda" else "model"
    config = normfuse.Config(target=target, ort_version=version, verify=verify)  # type: ignore[arg-type]
    report = normfuse.rewrite(source, out, config)
    assert report.model_check is None or report.model_check["equal"]
    assert len(report.norms) == family.norms and not report.refusals
    onnx.checker.check_model(out, full_check=True)
    assert normfuse.rewrite(out, tmp_path / "again.onnx", config).fused == 0
    assert (tmp_path / "again.onnx").read_bytes() == out.read_bytes()
    assert Counter(n.placement for n in normfuse.inspect(out).norms) == family.placements
    made = operators(onnx.load(out))
    if target == "normfuse":
        single = Counter({op: n for op, n in made.items() if op.startswith(("rms_norm", "layer_norm", "LayerN"))})
        found: Counter[str] = Counter()
        for op, n in (made - single).items():
            found[next(known for known in PLACED if op.removeprefix("bias_").startswith(known))] += n
        assert found == placed(name, report.norms[-1].kind)
        (before, _), (after, calls) = softmaxes(onnx.load(source)), softmaxes(onnx.load(out))
        assert after == 0 and calls == before
    elif version == "1.29":
        assert all(n.action in ("fused", "kept") or n.kind == "layer_norm" for n in report.norms)
    else:
        assert all(n.action in ("fused", "kept") for n in report.norms)
    if target == "standard":
        assert {(n.domain, n.op_type) for n in onnx.load(out).graph.node if n.domain or n.op_type in made} <= {
            ("", "LayerNormalization")}  # fmt: skip
        assert not onnx.load(out).functions
    want = placed(name, report.norms[-1].kind)
    beside = want["add_rms_norm"] + want["norm_add_norm"]
    if target == "ort-cuda" or version == "1.29":
        assert made[SKIP] == beside + (name == "olmo2")  # its last sum goes to the final norm, and not to norm_add


@pytest.mark.parametrize(("name", "target", "version"), share(
    ((name, *choice) for name in ("llama", "gemma3", "olmo2", "gpt2")
     for choice in (*CHOICES, ("onnx", ""), ("standard", ""), ("normfuse", ""))), 2),
)  # fmt: skip
def test_half_precision_is_no_further_from_float64(name: str, target: str, version: str, tmp_path: Path) -> None:
    family, out = FAMILIES[name], tmp_path / "out.onnx"
    module = family.build().half()
    source = cached(f"{name}-half-18-{digest(family)}.onnx",
                    lambda path: export_onnx(module, family.args(), path, 18))  # fmt: skip
    config = normfuse.Config(target=target, ort_version=version)  # type: ignore[arg-type]
    normfuse.rewrite(source, out, config)
    onnx.checker.check_model(out, full_check=True)
    true = module.double()(*family.args()).detach().numpy()
    feeds = dict(zip([i.name for i in session(source).get_inputs()], (a.numpy() for a in family.args()), strict=True))
    running = [session(source), session(out)]
    running += [open_session(out, "cpu", 1, True)] if target == "normfuse" and library_path() is not None else []
    before, *after = (np.abs(one.run(None, feeds)[0].astype("f8") - true).max() for one in running)
    assert max(after) <= 2 * before


def loaded(path: Path) -> tuple[Any, Counter[str]]:
    """A session, and the operators that ONNX Runtime runs in it after fusions of its own."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, f"{path}.loaded"
    found = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    ops = Counter(n.op_type.removeprefix("Fused") for n in onnx.load(f"{path}.loaded").graph.node)
    return found, ops


@pytest.mark.parametrize(("name", "target"), [
    *share(((name, "onnx") for name in FAMILIES), 2), *share(((name, "standard") for name in FAMILIES), 4),
    *share(((name, "normfuse") for name in FAMILIES), 2, 1),
])  # fmt: skip
def test_it_runs_without_our_library(name: str, target: str, tmp_path: Path) -> None:
    """In ONNX's reference evaluator, and in ONNX Runtime, where all that is more in it are norms; results are equal."""
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    shutil.copy(cached_export(name, 18), source)
    normfuse.rewrite(source, out, normfuse.Config(target=target))  # type: ignore[arg-type]
    (before, was), (after, now) = loaded(source), loaded(out)
    more = {op for op in now - was if "Norm" not in op}
    assert more <= ({"Reshape", "Div"} if target == "normfuse" else set())  # a view as in the model; instead of Mul
    assert sum(now.values()) <= sum(was.values()) + (now - was)["Reshape"]
    names = [str(i.name) for i in before.get_inputs()]
    feeds = dict(zip(names, (a.numpy() for a in FAMILIES[name].args()), strict=True))
    want = before.run(None, feeds)[0]
    results = [after.run(None, feeds)[0]]
    unable = ["bert"]  # the evaluator of onnx 1.23 does not run the GatherElements of the input
    unable += ["deepseek_v3"] if tuple(map(int, onnx.__version__.split(".")[:2])) < (1, 23) else []  # nor 1.22 its TopK
    if name not in unable:
        results += [np.asarray(next(iter(ReferenceEvaluator(onnx.load(out)).run(None, feeds))))]
    for found in results:
        assert np.abs(found - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize(("target", "version"), [("onnx", ""), ("standard", ""), *CHOICES, ("normfuse", "")])
def test_the_recogniser_of_pp_ocr(target: str, version: str, tmp_path: Path) -> None:
    """A pretrained model, exported by Paddle, its LayerNorms spelled out."""
    found = importlib.util.find_spec("rapidocr_onnxruntime")
    if found is None or found.origin is None:
        pytest.skip("rapidocr-onnxruntime is not installed")
    source, out = Path(found.origin).parent / "models/ch_PP-OCRv4_rec_infer.onnx", tmp_path / "out.onnx"
    config = normfuse.Config(target=target, ort_version=version)  # type: ignore[arg-type]
    report = normfuse.rewrite(source, out, config)
    assert len(report.norms) == 5 and not report.refusals
    action = "left" if version == "1.29" else "kept" if target == "standard" else "fused"  # it spells them as we do
    assert {n.action for n in report.norms} == {action}
    onnx.checker.check_model(out, full_check=True)
    if target == "normfuse":
        assert operators(onnx.load(out))["bias_add_layer_norm"] == 4
    image = np.random.default_rng(0).uniform(-1, 1, (1, 3, 48, 320)).astype("f4")
    a, b = (session(path).run(None, {"x": image})[0] for path in (source, out))
    assert np.abs(a - b).max() <= 1e-5 and (a.argmax(-1) == b.argmax(-1)).all()
    normfuse.rewrite(out, tmp_path / "again.onnx", config)
    assert (tmp_path / "again.onnx").read_bytes() == out.read_bytes()
