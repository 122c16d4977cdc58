"""Exported programs on disk: read without running anything they read as the loaded program does; rewritten by trust."""

from __future__ import annotations

import importlib
import json
import operator
import pickle
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normfuse
import normfuse.ops
from normfuse.config import Config
from normfuse.errors import InputError, UnsafeModelError, UnsupportedError
from normfuse.io.pt2 import MEMBERS
from tests.cli_tools import fails, fails_json, run
from tests.families import FAMILIES, cached, digest, exported_program
from tests.pt2_cases import MODULES, Small, X, edited, exported, saved
from tests.pt2_mutations import packed


def called(program: torch.export.ExportedProgram) -> Counter[str]:
    """What a program calls; of several results each loading gives all."""
    return Counter(str(n.target) for n in program.graph.nodes if n.target is not operator.getitem)


def told(report: normfuse.Report) -> dict[str, Any]:
    """A report without times."""
    out = report.to_dict()
    del out["summary"]["seconds"]
    return out


@pytest.mark.parametrize(("name", "decomposed"), [
    pytest.param(name, decomposed, marks=() if i % 2 == decomposed else pytest.mark.slow)
    for i, name in enumerate(MODULES) for decomposed in (False, True)
])  # fmt: skip
def test_a_file_reads_as_the_loaded_program_does(name: str, decomposed: bool, tmp_path: Path) -> None:
    program = exported(name)
    path = saved(program.run_decompositions() if decomposed else program, tmp_path / "model.pt2")
    report = normfuse.inspect(path)
    assert told(report) == told(normfuse.inspect(torch.export.load(path)))
    assert len(report.norms) == {"no grad": 2, "small": 2, "small with free sizes": 2, "condition": 1}.get(name, 1)


@pytest.mark.parametrize(("name", "dynamic", "decomposed"), [
    ("llama", False, False), ("gpt2", False, True),
    *(pytest.param(n, dynamic, decomposed, marks=pytest.mark.slow) for n in FAMILIES for dynamic in (False, True)
      for decomposed in (False, True)),
])  # fmt: skip
def test_families(name: str, dynamic: bool, decomposed: bool) -> None:
    family = FAMILIES[name]

    def write(path: Path) -> None:
        program = exported_program(family.build(), family.args(), dynamic=dynamic)
        torch.export.save(program.run_decompositions() if decomposed else program, path)

    path = cached(f"{name}-{dynamic}-{decomposed}-{digest(family)}.pt2", write)
    report = normfuse.inspect(path)
    assert len(report.norms) == family.norms
    assert told(report) == told(normfuse.inspect(torch.export.load(path)))


def test_a_norm_that_is_an_output_has_the_name_of_its_module(tmp_path: Path) -> None:
    class Copied(nn.Module):
        """Gives out a copy of its norm, as models of transformers do."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(16)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = torch.ops.aten.alias(self.norm(x))
            return out

    path = saved(torch.export.export(Copied(), (X,)), tmp_path / "model.pt2")
    assert [norm.name for norm in normfuse.inspect(path).norms] == ["norm/layer_norm"]


def test_nothing_is_loaded_to_inspect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(exported("small with free sizes"), tmp_path / "model.pt2")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("this would run code")

    for where, what in ((torch, "load"), (torch.export, "load"), (torch.fx.GraphModule, "recompile")):
        monkeypatch.setattr(where, what, never)
    monkeypatch.setattr(pickle, "loads", never)
    monkeypatch.setattr(importlib.import_module("sympy"), "sympify", never)
    assert len(normfuse.inspect(path).norms) == 2
    code, out, _ = run("inspect", path)
    assert code == 0 and "exported, " in out and "found 2" in out


def test_files_of_older_torch(tmp_path: Path) -> None:
    """Without names of nodes and kinds of arguments, as before schema 8.10."""
    path = saved(exported("no grad"), tmp_path / "model.pt2")

    def older(program: dict[str, Any]) -> dict[str, Any]:
        def strip(graph: dict[str, Any]) -> None:
            for node in graph["nodes"]:
                node.pop("name", None)  # torch 2.10 writes none
                for given in node["inputs"]:
                    if node["target"].startswith("torch.ops.aten"):
                        del given["kind"]
                    if "as_graph" in given["arg"]:
                        strip(given["arg"]["as_graph"]["graph"])

        strip(program["graph_module"]["graph"])
        program["schema_version"] = {"major": 8, "minor": 8}
        return program

    (tmp_path / "old.pt2").write_bytes(edited(path.read_bytes(), "models/model.json", older))
    report = normfuse.inspect(tmp_path / "old.pt2")
    assert told(report) == told(normfuse.inspect(torch.export.load(tmp_path / "old.pt2")))
    assert [n.fact for n in report.norms] == [n.fact for n in normfuse.inspect(path).norms]


def test_versions_that_are_not_known(tmp_path: Path) -> None:
    data = saved(exported("small"), tmp_path / "model.pt2").read_bytes()
    path = tmp_path / "new.pt2"
    path.write_bytes(edited(data, "models/model.json", lambda p: p | {"schema_version": {"major": 9, "minor": 0}}))
    assert "schema version 9" in fails_json(run("inspect", path, "--json"), "UnsupportedError")


def test_an_operator_of_no_library_is_opaque(tmp_path: Path) -> None:
    data = saved(exported("small"), tmp_path / "model.pt2").read_bytes()

    def rename(program: dict[str, Any]) -> dict[str, Any]:
        for node in program["graph_module"]["graph"]["nodes"]:
            if node["target"] == "torch.ops.aten.linear.default":
                node["target"] = "torch.ops.acme.linear.default"
        return program

    path = tmp_path / "acme.pt2"
    path.write_bytes(edited(data, "models/model.json", rename))
    assert [n.kind for n in normfuse.inspect(path).norms] == ["layer_norm", "rms_norm"]
    message = fails(run("rewrite", path, tmp_path / "out.pt2", "--trust"))
    assert "calls torch.ops.acme.linear.default" in message


# -- other files --------------------------------------------------------------------------------------------------


def test_other_files_are_named(tmp_path: Path) -> None:
    program = saved(exported("small"), tmp_path / "program.pt2")
    torch.save(Small().state_dict(), tmp_path / "weights.pth")
    torch.save(Small().state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "weights.safetensors").write_bytes((64).to_bytes(8, "little") + b'{"w":{}}'.ljust(64))
    (tmp_path / "weights.gguf").write_bytes(b"GGUF" + bytes(60))
    with zipfile.ZipFile(tmp_path / "plain.zip", "w") as z:
        z.writestr("a/b", "c")
    (tmp_path / "program.bin").write_bytes(program.read_bytes())
    for name, words in {"weights.pth": "torch.save", "old.pt": "pickle", "weights.safetensors": "safetensors",
                        "weights.gguf": "GGUF", "plain.zip": "no .pt2"}.items():  # fmt: skip
        for argv in (["inspect", tmp_path / name], ["rewrite", tmp_path / name, tmp_path / "out.onnx"]):
            assert words in fails(run(*argv))
        renamed = tmp_path / f"{name}.pt2"
        renamed.write_bytes((tmp_path / name).read_bytes())
        assert words in fails(run("inspect", renamed))
    assert "found 2" in run("inspect", tmp_path / "program.bin")[1]
    (tmp_path / "script.pt").write_bytes(packed([("script/constants.pkl", b""), ("script/data.pkl", b"")]))
    assert "TorchScript" in fails(run("inspect", tmp_path / "script.pt"))
    items = [("model/archive_format", b"pt2"), ("model/data/aotinductor/model/x.so", b"\x7fELF")]
    (tmp_path / "aoti.pt2").write_bytes(packed(items))
    assert "AOTInductor" in fails(run("inspect", tmp_path / "aoti.pt2"))
    (tmp_path / "flat.pt2").write_bytes(packed([("serialized_exported_program.json", b"{}"), ("version", b"8.1")]))
    assert "old torch" in fails(run("inspect", tmp_path / "flat.pt2"))


def test_as_many_members_as_a_model_may_have(tmp_path: Path) -> None:
    """Beyond 65,535 the directory has the 64-bit form."""
    path = saved(exported("small"), tmp_path / "model.pt2")
    with zipfile.ZipFile(path) as z:
        items = [(i.filename, z.read(i)) for i in z.infolist()]
    more = [(f"model/extra/{i}", b"") for i in range(MEMBERS - len(items))]
    path.write_bytes(packed([*items, *more]))
    assert len(normfuse.inspect(path).norms) == 2


# -- rewriting ----------------------------------------------------------------------------------------------------


def test_rewrite_needs_trust(tmp_path: Path) -> None:
    path = saved(exported("small"), tmp_path / "model.pt2")
    for more in ([tmp_path / "out.pt2"], ["--dry-run"], ["--in-place"]):
        assert "--trust" in fails_json(run("rewrite", path, *more, "--json"), "UnsafeModelError")
    with pytest.raises(UnsafeModelError, match="trust=True"):
        normfuse.rewrite(path, tmp_path / "out.pt2")
    with pytest.raises(UnsafeModelError, match=r"torch\.export\.load"):
        normfuse.optimize(path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]


def test_rewrite_gives_the_program_that_optimize_gives(tmp_path: Path) -> None:
    path, out = saved(exported("small with free sizes"), tmp_path / "model.pt2"), tmp_path / "out.pt2"
    before = path.read_bytes()
    code, text, _ = run("rewrite", path, out, "--trust", "--verify", "model")
    assert code == 0 and "whole model: equal" in text and "import normfuse.ops" in text and f"wrote {out}" in text
    fused, report = normfuse.optimize(torch.export.load(path))
    loaded = torch.export.load(out)
    assert called(loaded) == called(fused)
    assert any(str(n.target).startswith("normfuse.") for n in loaded.graph.nodes)
    want, got = torch.export.load(path).module()(X).double(), loaded.module()(X).double()
    assert (want - got).abs().max() <= 2.0**-22 * want.abs().max()
    assert len(normfuse.inspect(out).norms) == len(report.norms) == 2
    assert told(normfuse.inspect(out)) == told(normfuse.inspect(loaded))
    assert path.read_bytes() == before
    again = normfuse.rewrite(out, tmp_path / "again.pt2", trust=True)
    assert not again.fused and (tmp_path / "again.pt2").read_bytes() == out.read_bytes()


def test_the_result_loads_elsewhere_with_the_operators(tmp_path: Path) -> None:
    path, out = saved(exported("small"), tmp_path / "model.pt2"), tmp_path / "out.pt2"
    normfuse.rewrite(path, out, trust=True)
    code = "import sys, torch, normfuse.ops; print(torch.export.load(sys.argv[1]).module()(torch.ones(2, 4, 16)).shape)"
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=True)
    assert "8, 16" in done.stdout


def test_layernorm_to_rmsnorm(tmp_path: Path) -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm, self.head = nn.Embedding(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.head(self.norm(self.table(ids)))
            return out

    ids = torch.arange(8).reshape(2, 4)
    path, out = saved(torch.export.export(Stream().eval(), (ids,)), tmp_path / "model.pt2"), tmp_path / "out.pt2"
    report = normfuse.rewrite(path, out, Config("exact", verify="model"), trust=True)
    assert report.converted == 1 and report.model_check is not None and report.model_check["equal"]
    assert [n.kind for n in normfuse.inspect(out).norms] == ["rms_norm"]


class Biased(nn.Module):
    """A LayerNorm whose input has a mean that no weight makes zero."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(x.float() * scale))
        return out


@pytest.fixture
def biased(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    free = {"x": {0: torch.export.Dim.AUTO}, "scale": None}
    example = (X.bfloat16(),), {"scale": torch.ones(16)}
    return saved(torch.export.export(Biased().eval(), *example, dynamic_shapes=free), tmp_path / "model.pt2")


def test_calibration_from_files(biased: Path, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((3, 2, 4, 16)).astype(np.float32) + 0.3
    scale = np.ones(16, np.float32)
    for i, x in enumerate(rows):
        np.savez(tmp_path / f"{i}.npz", scale=scale, x=x)
    np.savez(tmp_path / "wrong.npz", y=rows[0])
    approximate = ["--layernorm-to-rmsnorm", "approximate", "--tolerance", "0.5", "--force", "--trust", "--json"]
    code, out, _ = run("rewrite", biased, tmp_path / "out.pt2", *approximate, "--calibration", tmp_path / "0.npz")
    assert "two sets" in json.loads(out)["error"]["message"] and code == 2  # x alone has a free axis to split along
    (tmp_path / "wrong.npz").rename(tmp_path / "wrong")
    code, out, _ = run("rewrite", biased, tmp_path / "out.pt2", *approximate, "--calibration", tmp_path)
    found = json.loads(out)["summary"]["approximation"]
    assert code == 0 and (found["calibrated"], found["held_back"]) == (2, 1)
    batches = [(torch.from_numpy(x).bfloat16(), torch.from_numpy(scale)) for x in rows]
    config = Config("approximate", tolerance=0.5, force=True)
    _, report = normfuse.optimize(torch.export.load(biased), config, calibration=batches)
    assert report.approximation is not None and report.approximation.error == found["error"]
    (tmp_path / "wrong").rename(tmp_path / "wrong.npz")
    assert "'y'" in fails_json(run("rewrite", biased, tmp_path / "o.pt2", *approximate, "--calibration",
                                   tmp_path / "wrong.npz"))  # fmt: skip


def test_verify(biased: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out.pt2", saved(exported("small"), tmp_path / "other.pt2")
    normfuse.rewrite(biased, out, trust=True)
    assert "--trust" in fails_json(run("verify", biased, out, "--json"), "UnsafeModelError")
    code, text, _ = run("verify", biased, out, "--trust")
    assert code == 0 and "equal: largest difference" in text and "torch" in text
    assert "other inputs" in fails(run("verify", biased, other, "--trust"))
    inputs = tmp_path / "inputs.npz"
    np.savez(inputs, x=np.ones((5, 4, 16), np.float32), scale=np.ones(16, np.float32))
    data = json.loads(run("verify", biased, out, "--trust", "--inputs", inputs, "--json")[1])
    assert data["equal"] and data["outputs"][0]["shape"] == [5, 4, 8]
    np.savez(inputs, x=np.ones((5, 4, 15), np.float32), scale=np.ones(16, np.float32))
    message = fails(run("verify", biased, out, "--trust", "--inputs", inputs))
    assert "set of inputs 0: input 'x' has shape 5x4x15" in message
    program = torch.export.load(out)
    with torch.no_grad():
        program.state_dict["head.bias"].add_(1)
    program._example_inputs = None
    assert run("verify", biased, saved(program, out), "--trust")[0] == 1
    assert "--inputs" in fails(run("verify", out, biased, "--trust"))
    (tmp_path / "m.onnx").write_bytes(b"\x08\x08")
    assert "two of a kind" in fails(run("verify", biased, tmp_path / "m.onnx", "--trust"))


def test_folding_a_scale_is_a_change(tmp_path: Path) -> None:
    module = nn.Sequential(nn.RMSNorm(16, 1e-5), nn.Linear(16, 8))
    with torch.no_grad():
        next(module.parameters()).uniform_(0.5, 1.5)
    path = saved(torch.export.export(module.eval(), (X,)), tmp_path / "model.pt2")
    report = normfuse.rewrite(path, tmp_path / "out.pt2", Config(fold_scale=True, verify="model"), trust=True)
    assert report.notes and report.model_check is not None and report.model_check["equal"]
    state = torch.export.load(tmp_path / "out.pt2").state_dict
    assert not any(torch.equal(state["1.weight"], v) for v in module.state_dict().values())


def test_verify_model_needs_example_inputs(tmp_path: Path) -> None:
    program = exported("small")
    program._example_inputs = None
    path = saved(program, tmp_path / "model.pt2")
    assert "example inputs" in fails(run("rewrite", path, tmp_path / "out.pt2", "--trust", "--verify", "model"))
    assert run("rewrite", path, tmp_path / "out.pt2", "--trust")[0] == 0


def test_a_difference_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from normfuse.frontends import fx_model

    path, run_ = saved(exported("small"), tmp_path / "model.pt2"), fx_model.run

    def wrong(model: Any, *args: Any, **more: Any) -> Any:
        result, report = run_(model, *args, **more)
        with torch.no_grad():
            changed = nn.Parameter(result.state_dict["weight"] + 0.01)
        result._state_dict = result.state_dict | {"weight": changed}
        return result, report

    monkeypatch.setattr(fx_model, "run", wrong)
    message = fails(run("rewrite", path, tmp_path / "out.pt2", "--trust", "--verify", "model"), 1)
    assert "nothing was written" in message and not (tmp_path / "out.pt2").exists()


def test_options_and_outputs(tmp_path: Path) -> None:
    path = saved(exported("small"), tmp_path / "model.pt2")
    onnx_path, existing = tmp_path / "m.onnx", tmp_path / "existing.pt2"
    onnx_path.write_bytes(b"\x08\x08")
    existing.write_text("keep me")
    before = sorted(tmp_path.iterdir())
    for more in (["--target", "ort-cpu"], ["--ort-version", "1.31"], ["--external-data", "reference"],
                 ["--layernorm-to-rmsnorm", "approximate", "--calibration", "x.npz"],  # is not there
                 ["--layernorm-to-rmsnorm", "approximate"]):  # fmt: skip
        fails(run("rewrite", path, tmp_path / "out.pt2", "--trust", *more))
    assert "normfuse.export" in fails(run("rewrite", path, tmp_path / "out.onnx", "--trust"))
    assert "ends in .pt2" in fails(run("rewrite", path, tmp_path / "out", "--trust"))
    assert "ends in .onnx" in fails(run("rewrite", onnx_path, tmp_path / "out.pt2"))
    assert "existing.pt2" in fails(run("rewrite", path, existing, "--trust"))
    assert "--in-place" in fails(run("rewrite", path, path, "--trust"))
    assert existing.read_text() == "keep me" and sorted(tmp_path.iterdir()) == before
    assert "exists already" in run("rewrite", path, existing, "--trust", "--dry-run")[1]
    code, text, _ = run("rewrite", path, "--trust", "--dry-run")
    assert code == 0 and "nothing was written" in text and sorted(tmp_path.iterdir()) == before
    assert run("rewrite", path, existing, "--trust", "--overwrite")[0] == 0
    assert json.loads(run("rewrite", path, "--in-place", "--trust", "--json")[1])["fused"] == 1
    assert path.read_bytes()[:4] == b"PK\3\4" and len(normfuse.inspect(path).norms) == 2


def test_a_program_without_norms_is_copied(tmp_path: Path) -> None:
    path = saved(torch.export.export(nn.Linear(3, 3), (torch.ones(2, 3),)), tmp_path / "model.pt2")
    report = normfuse.rewrite(path, tmp_path / "out.pt2", Config(verify="model"), trust=True)
    assert not report.norms and (tmp_path / "out.pt2").read_bytes() == path.read_bytes()


def test_strict(tmp_path: Path) -> None:
    class Near(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / (torch.sqrt(x.pow(2).mean(-1, keepdim=True)) + 1e-6)

    path = saved(torch.export.export(Near(), (X,)), tmp_path / "model.pt2")
    assert run("rewrite", path, tmp_path / "out.pt2", "--trust")[0] == 0
    assert run("rewrite", path, tmp_path / "out.pt2", "--trust", "--strict", "--overwrite")[0] == 1


def test_an_interrupted_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(exported("small"), tmp_path / "model.pt2")

    def broken(program: object, f: Any) -> None:
        f.write(b"half")
        raise RuntimeError("cannot serialize\nmore")

    monkeypatch.setattr(torch.export, "save", broken)
    with pytest.raises(UnsupportedError, match="cannot serialize"):
        normfuse.rewrite(path, tmp_path / "out.pt2", trust=True)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]
    with pytest.raises(InputError, match="no such file"):
        normfuse.rewrite(tmp_path / "missing.pt2", tmp_path / "out.pt2", trust=True)
