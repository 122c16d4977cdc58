"""`inspect`, `rewrite` and `optimize` on every kind of model, each giving back its own type."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

import normfuse
from normfuse.verify import compare
from tests.families import FAMILIES, cached_export, dynamo_graphs, exported_program
from tests.spelling_files import session
from tests.share import share


@pytest.fixture(scope="module")
def llama() -> Path:
    return cached_export("llama", 18)


def test_optimize_gives_back_the_type_it_was_given(llama: Path) -> None:
    proto = onnx.load(llama)
    before = proto.SerializeToString(deterministic=True)
    out, report = normfuse.optimize(proto)
    assert isinstance(out, onnx.ModelProto) and report.fused == 5
    onnx.checker.check_model(out, full_check=True)
    assert proto.SerializeToString(deterministic=True) == before
    model = ir.load(llama)
    nodes = len(model.graph)
    out, report = normfuse.optimize(model)
    assert isinstance(out, ir.Model) and report.fused == 5 and len(out.graph) < nodes == len(model.graph)
    out, report = normfuse.optimize(llama)
    assert isinstance(out, ir.Model) and report.fused == 5


def test_optimize_of_an_onnx_program() -> None:
    family = FAMILIES["qwen3"]
    with torch.no_grad():
        program = torch.onnx.export(family.build(), family.args(), dynamo=True, opset_version=18, verbose=False)
    assert program is not None
    out, report = normfuse.optimize(program)
    assert isinstance(out, torch.onnx.ONNXProgram) and report.fused == 9
    assert len(out.model.graph) < len(program.model.graph)


def test_optimize_of_torch_graphs() -> None:
    family = FAMILIES["llama"]
    module, args = family.build(), family.args()
    program = exported_program(module, args)
    out, report = normfuse.optimize(program)
    assert isinstance(out, torch.export.ExportedProgram) and len(report.norms) == report.fused == 5
    torch.testing.assert_close(out.module()(*args), module(*args), rtol=1e-5, atol=1e-5)
    graph, inputs = dynamo_graphs(module, args)[0]
    fused, report = normfuse.optimize(graph)
    assert isinstance(fused, torch.fx.GraphModule) and report.fused == 5
    torch.testing.assert_close(fused(*inputs), graph(*inputs), rtol=1e-5, atol=1e-5)


def test_inspect_of_every_kind(llama: Path) -> None:
    for model in (llama, str(llama), onnx.load(llama), ir.load(llama)):
        report = normfuse.inspect(model)
        assert len(report.norms) == 5 and report.recipe == "RMSNorm, pre-norm"
    with pytest.raises(normfuse.InputError, match="is not a model that NormFuse reads"):
        normfuse.inspect(object())
    with pytest.raises(normfuse.InputError, match=r"is an nn.Module, whose norms are seen once it is traced"):
        normfuse.inspect(torch.nn.Linear(2, 2))
    with pytest.raises(normfuse.UnsupportedError, match="exact"):
        normfuse.optimize(torch.nn.Linear(2, 2))


def test_report_is_the_contract(llama: Path, tmp_path: Path) -> None:
    found = normfuse.inspect(llama).to_dict()
    assert found["schema"] == 1 and set(found) == {"schema", "norms", "refusals", "summary"}
    keys = {"name", "kind", "axes", "size", "eps", "dtype", "weight", "bias", "placement", "fact", "form", "cast"}
    assert all(set(norm) == keys for norm in found["norms"])
    norm = found["norms"][0]
    assert norm["fact"] == "w*x*(mean(x^2) + 1e-06)^-1/2" and norm["form"] == "decomposed" and norm["axes"] == [-1]
    done = normfuse.rewrite(llama, tmp_path / "out.onnx").to_dict()
    assert {k: done[k] for k in ("found", "fused", "converted", "refused")} == {
        "found": 5, "fused": 5, "converted": 0, "refused": 0,
    }  # fmt: skip
    assert done["nodes_before"] == len(onnx.load(llama).graph.node)
    assert done["nodes_after"] == len(onnx.load(tmp_path / "out.onnx").graph.node)
    assert all(norm["action"] == "fused" and norm["verified"] is True for norm in done["norms"])


def test_what_is_not_edited_keeps_its_bytes(llama: Path, tmp_path: Path) -> None:
    source = onnx.load(llama)
    source.doc_string, source.model_version, source.producer_version = "a model", 7, "x.y"
    source.metadata_props.add(key="owner", value="someone")
    source.graph.doc_string = "a graph"
    source.graph.initializer.append(onnx.numpy_helper.from_array(np.arange(5), "read_by_nobody"))
    source.graph.node[3].doc_string = "a node"
    path = tmp_path / "in.onnx"
    onnx.save(source, path)
    normfuse.rewrite(path, tmp_path / "out.onnx")
    result = onnx.load(tmp_path / "out.onnx")
    for field in ("doc_string", "model_version", "producer_name", "producer_version", "ir_version"):
        assert getattr(result, field) == getattr(source, field)
    assert list(result.metadata_props) == list(source.metadata_props)
    assert result.graph.doc_string == "a graph" and result.graph.name == source.graph.name
    assert list(result.graph.input) == list(source.graph.input)
    assert list(result.graph.output) == list(source.graph.output)
    before = {node.name: node.SerializeToString() for node in source.graph.node}
    kept = [node for node in result.graph.node if node.domain != "normfuse"]
    assert kept and all(before[node.name] == node.SerializeToString() for node in kept)
    weights = {t.name: t.SerializeToString() for t in source.graph.initializer}
    assert all(weights[t.name] == t.SerializeToString() for t in result.graph.initializer)
    assert "read_by_nobody" in {t.name for t in result.graph.initializer}
    made = {n for node in result.graph.node for n in node.output}
    gone = {n for node in source.graph.node for n in node.output} - made
    assert gone and not gone & {v.name for v in result.graph.value_info}


def test_external_data_is_copied_under_the_name_of_its_content(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    source = tmp_path / "a" / "m.onnx"
    onnx.save(onnx.load(llama), source, save_as_external_data=True, location="w.bin", size_threshold=200)
    report = normfuse.rewrite(source, tmp_path / "b" / "out.onnx")
    assert report.fused == 5
    (data,) = (tmp_path / "b").glob("*.data")
    assert data.read_bytes() == (tmp_path / "a" / "w.bin").read_bytes()
    feeds = {"input_ids": np.ones((2, 7), np.int64)}
    runtime = session(tmp_path / "b" / "out.onnx")
    feeds = {runtime.get_inputs()[0].name: feeds["input_ids"]}
    np.testing.assert_allclose(runtime.run(None, feeds)[0], session(llama).run(None, feeds)[0], atol=1e-5)


def test_dry_run_writes_nothing(llama: Path, tmp_path: Path) -> None:
    report = normfuse.rewrite(llama, tmp_path / "out.onnx", dry_run=True)
    assert report.fused == 5 and not list(tmp_path.iterdir())


def test_verification_rolls_back_a_wrong_site(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from normfuse.frontends import onnx_functions

    right = onnx_functions.function_for

    def wrong(*args: object) -> ir.Function:
        function = right(*args)  # type: ignore[arg-type]
        for node in function:
            if node.op_type == "Div":
                node.op_type = "Mul"
        return function

    monkeypatch.setattr("normfuse.frontends.onnx_emit.function_for", wrong)
    report = normfuse.rewrite(llama, tmp_path / "out.onnx")
    assert report.fused == 0 and {r.code for r in report.refusals} == {"NF201"}
    assert all(norm.action == "refused" and norm.verified is False for norm in report.norms)
    assert (tmp_path / "out.onnx").read_bytes() == llama.read_bytes()


def test_model_verification_stops_a_wrong_rewrite(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from normfuse import verify

    monkeypatch.setattr(verify, "_compare_output", lambda name, *rest: ({"name": name, "max_rel": 1.0}, False))
    monkeypatch.setattr("normfuse.frontends.onnx_wide.widen_norms", lambda model: 0)
    with pytest.raises(normfuse.VerificationError, match="nothing was written"):
        normfuse.rewrite(llama, tmp_path / "out.onnx", normfuse.Config(verify="model"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("right", [True, False])
def test_model_verification_copies_no_weights_twice(right: bool, llama: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from normfuse import verify
    from normfuse.io import files

    source, out, copied, copy = tmp_path / "in.onnx", tmp_path / "out", list[str](), files._copy_data

    def counted(*args: Any) -> str:
        copied.append(copy(*args))
        return copied[-1]

    onnx.save(onnx.load(llama), source, save_as_external_data=True, location="w.bin", size_threshold=200)
    out.mkdir()
    monkeypatch.setattr(files, "_copy_data", counted)
    if not right:
        monkeypatch.setattr(verify, "_compare_output", lambda name, *rest: ({"name": name, "max_rel": 1.0}, False))
        monkeypatch.setattr("normfuse.frontends.onnx_wide.widen_norms", lambda model: 0)
        with pytest.raises(normfuse.VerificationError, match="nothing was written"):
            normfuse.rewrite(source, out / "out.onnx", normfuse.Config(verify="model"))
    else:
        report = normfuse.rewrite(source, out / "out.onnx", normfuse.Config(verify="model"))
        assert report.model_check is not None and report.model_check["equal"]
    assert len(copied) == 1 and {p.name for p in out.iterdir()} == ({"out.onnx", *copied} if right else set())
    dry = normfuse.rewrite(source, out / "dry.onnx", normfuse.Config(verify="model"), dry_run=True) if right else None
    assert dry is None or (dry.model_check is not None and not (out / "dry.onnx").exists())


@pytest.mark.parametrize("target", share(["onnx", "ort-cuda", "normfuse"], 2))
def test_the_result_does_not_depend_on_hash_seeds(target: str, tmp_path: Path) -> None:
    path = cached_export("gemma3", 18)
    results = []
    for seed in ("1", "2"):
        out = tmp_path / f"{seed}.onnx"
        code = "import sys, normfuse; normfuse.rewrite(*sys.argv[1:3], normfuse.Config(target=sys.argv[3]))"
        subprocess.run([sys.executable, "-c", code, str(path), str(out), target], check=True,
                       env=os.environ | {"PYTHONHASHSEED": seed})  # fmt: skip
        results.append(out.read_bytes())
    assert results[0] == results[1]


@pytest.mark.parametrize(("option", "value", "error"), [
    ("numerics", "loose", normfuse.InputError),
    ("target", "gpu", normfuse.InputError),
    ("verify", "maybe", normfuse.InputError),
    ("ort_version", 131, normfuse.InputError),
    ("layernorm_to_rmsnorm", "yes", normfuse.InputError), ("tolerance", 0.0, normfuse.InputError),
    ("norms", " , ", normfuse.InputError),
])  # fmt: skip
def test_config_says_what_it_knows(option: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=str(value)):
        normfuse.Config(**{option: value})  # type: ignore[arg-type]


def test_the_check_has_rows_that_float16_cannot_square() -> None:
    """x / sqrt(mean((x/512)^2)) in float16, and what is the same function and infinite on the way."""

    def scaled(factor: float) -> Callable[[Any, bool], Any]:
        def norm(x: Any, wide: bool) -> Any:
            x = x.astype(np.float64 if wide else np.float16)
            root = np.sqrt(np.mean((x * x.dtype.type(factor)) ** 2, -1, keepdims=True) + x.dtype.type(factor**2 / 16))
            return x / root * x.dtype.type(factor)

        return norm

    found = compare(scaled(1 / 512), scaled(1 / 4), (4, 64), "float16", "float16")
    assert not found.ok and found.same and "very large" in found.message
    assert compare(scaled(1.0), scaled(1 / 16), (4, 64), "float16", "float16").ok  # which is better than it was
