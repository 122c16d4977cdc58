"""Options and arguments of the Python door and the command line that are wrong, or mean nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import normfuse
from normfuse import bench
from normfuse.errors import InputError
from normfuse.reduce import reduce
from tests.cli_tools import cli, program, rms_file


def test_documented_names() -> None:
    code = "import normfuse; normfuse.bench.How; normfuse.ops.to_onnx.export"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("option", ["dynamo", "export_params", "external_data"])
def test_what_torch_may_be_told_all_the_same(option: str, tmp_path: Path) -> None:
    module, x = torch.nn.RMSNorm(8).eval(), (torch.randn(2, 8),)
    export: Any = normfuse.export
    with pytest.raises(InputError, match=f"takes no option '{option}'"):
        export(module, x, tmp_path / "a.onnx", **{option: False})
    assert len(export(module, x, tmp_path / "a.onnx", **{option: True}).norms) == 1


@pytest.mark.parametrize(("given", "said"), [
    ({"norms": 3}, r"norms=3 is not a text, such as '\*\.output"),
    ({"first": None}, "first=None is not a text, such as 'onnxsim'"), ({"first": ","}, "first=',' names no optimiser"),
    ({"first": "onnxsim, onnxsim"}, "first='onnxsim, onnxsim' names an optimiser twice"),
    ({"ort_version": "x"}, "ort_version='x' is not a version"), ({"tolerance": 10**400}, "tolerance is larger than"),
    ({"tolerance": "x"}, "tolerance='x' is not a number"), ({"tolerance": True}, "tolerance=True is not a number"),
    ({"untie": "no"}, "untie='no' is not True or False"), ({"ort_version": 1.31}, "ort_version=1.31 is not a text"),
])  # fmt: skip
def test_options_of_another_type(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        normfuse.Config(**given)


NOTHING: Any = None


@pytest.mark.parametrize(("call", "said"), [
    (lambda p: normfuse.rewrite(onnx.load(p), p), "the input is a ModelProto and not the path of a file; normfuse.opt"),
    (lambda p: normfuse.rewrite(p, NOTHING), "the output is a NoneType and not the path of a file"),
    (lambda p: normfuse.export(torch.nn.LayerNorm(8), (torch.ones(8),), NOTHING), "the output is a NoneType and not"),
    (lambda p: normfuse.inspect(p).save_html(NOTHING), "the page is a NoneType and not the path of a file"),
    (lambda p: normfuse.inspect(os.fsencode(p)), "a bytes is not a model that NormFuse reads"),
    (lambda p: normfuse.inspect(onnx.ModelProto()), "the ModelProto: not an ONNX model .no graph in it."),
    (lambda p: bench.bench([], bench.How()), "give a list of one model, or of two"),
    (lambda p: bench.bench(str(p), bench.How()), "give a list of one model, or of two"),
    (lambda p: bench.How(rounds=0), "rounds=0: it takes 3 rounds"),
    (lambda p: bench.How(threads=-1), "threads=-1: give 1 to"),
])  # fmt: skip
def test_arguments_of_another_kind(call: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^{said}"):
        call(rms_file(tmp_path / "in.onnx"))


def test_weights_under_an_old_name_are_named(tmp_path: Path) -> None:
    source = rms_file(tmp_path / "in.onnx")
    onnx.save(onnx.load(source), source, save_as_external_data=True, location="in.data", size_threshold=0)
    (calls,) = normfuse.rewrite(source, tmp_path / "other.onnx").notes
    assert "function of the model" in calls
    _, left = normfuse.rewrite(source, source, in_place=True).notes
    assert left.endswith(f"{tmp_path / 'in.data'} is not read by the model any more")
    assert normfuse.rewrite(source, source, in_place=True).notes == [calls]  # with nothing to do


@pytest.mark.parametrize(("call", "said"), [
    (lambda p: normfuse.rewrite(p / "in.pt2", p / "out.pt2", trust="no"), "allow it with"),  # type: ignore[arg-type]
    (lambda p: normfuse.optimize(p / "in.onnx", {"numerics": "fast"}), "config is a dict"),  # type: ignore[arg-type]
    (lambda p: normfuse.rewrite(p / "in.onnx", p / "o.onnx", normfuse.Config), "config is the class"),  # type: ignore[arg-type]
    (lambda p: normfuse.export(torch.nn.LayerNorm(8), (torch.ones(2, 8),), p / "o.onnx", 3), "config is a int"),  # type: ignore[arg-type]
    (lambda p: normfuse.InductorPass({}), "config is a dict"),  # type: ignore[arg-type]
    (lambda p: normfuse.rewrite(p / "in.onnx", p / "o.onnx", calibration=p / "gone"), "leave them out"),
    (lambda p: normfuse.optimize(p / "in.onnx", calibration=[]), "leave them out"),
    (lambda p: normfuse.optimize(p / "in.onnx", args=(1,)), "args and kwargs are to trace an nn.Module with"),
    (lambda p: normfuse.optimize(torch.export.load(p / "in.pt2"), kwargs={"a": 1}), "args and kwargs are to trace"),
    (lambda p: normfuse.optimize(torch.export.load(p / "in.pt2"), normfuse.Config(target="ort-cpu")),
     "target='ort-cpu' is for ONNX models, and torch runs this one"),
    (lambda p: normfuse.optimize(torch.nn.LayerNorm(8), normfuse.Config("exact", target="ort-cuda"), args=(1,)),
     "target='ort-cuda' is for ONNX models"),
    (lambda p: normfuse.InductorPass(normfuse.Config(target="ort-cpu")), "target='ort-cpu' is for ONNX models"),
    (lambda p: normfuse.InductorPass(normfuse.Config(untie=True)), "untie=True is for"),
    (lambda p: normfuse.InductorPass(normfuse.Config("approximate")), "measures a module on inputs"),
    (lambda p: reduce(p / "in.onnx", p / "o.onnx", normfuse.Config(force=True)), "force=True is for"),
    (lambda p: reduce("", p / "o.onnx"), "the input is an empty path; give the name of a file"),
    (lambda p: normfuse.verify.compare_models(p / "in.onnx", p / "in.onnx", inputs={"x": np.ones((1, 3))}), "is given"),
])  # fmt: skip
def test_arguments_that_mean_nothing(call: Any, said: str, tmp_path: Path) -> None:
    rms_file(tmp_path / "in.onnx")
    program(tmp_path / "in.pt2")
    with pytest.raises(normfuse.NormFuseError, match=said):
        call(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.onnx", "in.pt2"]


MEANINGLESS: list[tuple[dict[str, Any], str]] = [
    ({"norms": "a*"}, "norms='a*'"), ({"norms": "a*", "layernorm_to_rmsnorm": "exact"}, "norms='a*'"),
    ({"tolerance": 0.5, "layernorm_to_rmsnorm": "exact"}, "tolerance=0.5"),
    ({"untie": True, "fold_scale": True}, "untie=True"), ({"force": True, "target": "ort-cpu"}, "force=True"),
    ({"ort_version": "1.31"}, "ort_version='1.31'"), ({"ort_version": "1.31", "target": "normfuse"}, "ort_version="),
]


@pytest.mark.parametrize(("options", "said"), MEANINGLESS, ids=str)
def test_options_that_mean_nothing(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    source, config = rms_file(tmp_path / "in.onnx"), normfuse.Config(**options)
    calls: list[Any] = [
        lambda: normfuse.rewrite(source, tmp_path / "o.onnx", config), lambda: normfuse.optimize(source, config),
        lambda: normfuse.export(torch.nn.LayerNorm(8), (torch.ones(2, 8),), tmp_path / "o.onnx", config)]  # fmt: skip
    for call in calls:
        with pytest.raises(InputError, match=f"{re.escape(said)}.* is for .*, and means nothing here; leave it out"):
            call()
    typed = [f"--{name.replace('_', '-')}" if value is True else f"--{name.replace('_', '-')}={value}"
             for name, value in options.items()]  # fmt: skip
    done = cli("rewrite", source, tmp_path / "o.onnx", *typed)
    assert done.returncode == 2 and not (tmp_path / "o.onnx").exists()
    flag = "--" + said.partition("=")[0].replace("_", "-")
    assert f"normfuse: {flag} " in done.stderr and f"{flag} True" not in done.stderr


def test_no_arguments_are_none() -> None:
    """As of `torch.export.export`, what `args` says is that there are none."""
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x, self.n = torch.nn.Linear(1, 8), torch.nn.LayerNorm(8)

        def forward(self, at: float = 1.0) -> torch.Tensor:
            found: torch.Tensor = self.n(self.x(torch.full((2, 1), at)))
            return found

    _, report = normfuse.optimize(Own().eval(), normfuse.Config("exact"), args=None)
    assert report.converted == 1
    program = torch.export.export(torch.nn.LayerNorm(8), (torch.ones(2, 8),))
    assert normfuse.optimize(program, args=None)[1].norms


def test_numbers_of_numpy_are_numbers() -> None:
    half: Any = np.float32(0.5)
    assert normfuse.Config(tolerance=half) == normfuse.Config(tolerance=0.5)
    assert "tolerance=0.5" in repr(normfuse.Config(tolerance=half))


class Named:
    """A path that is no Path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


def test_paths_of_any_kind(tmp_path: Path) -> None:
    source = Named(rms_file(tmp_path / "in.onnx"))
    assert len(normfuse.inspect(source).norms) == 1 and normfuse.optimize(source)[1].fused == 1
    for command in (["inspect"], ["rewrite", "--in-place"], ["verify", source.path], ["bench"]):
        done = cli(*command, "")
        assert done.returncode == 2 and "is an empty path; give the name of a file" in done.stderr, done.stderr


@pytest.mark.parametrize("option", [{"first": "onnxsim"}, {"ort_version": "1.31"}, {"target": "ort-cpu"}])
def test_options_that_torch_has_no_use_for(option: dict[str, Any]) -> None:
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"has no option|is for ONNX models"):
        torch.compile(torch.nn.LayerNorm(8), backend="normfuse", options=option)(torch.ones(2, 8))


@pytest.mark.parametrize("asked", [18, 99])
def test_an_opset_that_the_exporter_does_not_give(asked: int, tmp_path: Path) -> None:
    report = normfuse.export(torch.nn.LayerNorm(8), (torch.ones(2, 8),), tmp_path / "o.onnx", opset_version=asked)
    said = f"opset {asked} was asked for: torch.onnx.export does not convert this model to it" in report.notes
    assert said is (report.opset != asked)


def lookup(path: Path) -> Path:
    lines = "e = Gather(table, ids) f = Gather(table, more) s = Add(e, f) p = Relu(s) "
    lines += "y = LayerNormalization<axis=-1>(p, w)"
    head = '<ir_version: 9, opset_import: ["": 18]> g (int64[B] ids, int64[C] more) => (float[D,16] y)'
    made = onnx.parser.parse_model(f"{head} {{ {lines} }}")
    for name, array in (("table", np.random.default_rng(0).random((8, 16))), ("w", np.ones(16))):
        made.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    onnx.save(made, path)
    return path


@pytest.mark.parametrize(("ids", "said"), [
    ([0] * 8, "does not run on the calibration inputs"), ([0.0, 1.0, 2.5] * 4, "holds numbers that int64 does not"),
    ([0.0, 1.0, 2.0] * 4, ""),
])  # fmt: skip
def test_calibration_inputs_that_do_not_fit(ids: list[float], said: str, tmp_path: Path) -> None:
    for name in "ab":
        np.savez(tmp_path / f"{name}.npz", ids=np.array(ids), more=np.arange(12) % 8)
    done = cli("rewrite", lookup(tmp_path / "in.onnx"), tmp_path / "out.onnx", "--layernorm-to-rmsnorm", "approximate",
               "--calibration", tmp_path, "--tolerance", "9")  # fmt: skip
    assert done.returncode == (2 if said else 0) and said in done.stderr
