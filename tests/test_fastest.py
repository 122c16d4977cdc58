"""`first="fastest"`: what is measured, what is chosen of it, and what a user is told. Times are given where a choice is
tried; they are measured where it is tried that they are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import normfuse
from normfuse import Config, fastest
from normfuse.bench import How
from normfuse.errors import InputError, UnsupportedError
from normfuse.verify import compare_models
from tests.cli_tools import fails, run
from tests.families import cached_export
from tests.onnx_lines import model as lines_model
from tests.onnx_lines import rms

went: list[tuple[str, str]] = []
"""The optimisers that went, and after which: the fixture `tools` sees to it."""
PLAIN, SCRIPT, SIM, BOTH = ("rewritten", "rewritten after onnxscript", "rewritten after onnxsim",
                            "rewritten after onnxscript,onnxsim")  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A norm and an addition, with something for onnxsim to take away."""
    path = tmp_path / "model.onnx"
    text = "one = Constant<value_float = 1.0>() i = Mul(x, one) " + rms("i", "n") + "y = Add(n, r)"
    onnx.save(lines_model(text, "y", shape="b,s,16"), path)
    return path


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which optimisers are installed; what they make is another model each, and computes the same."""
    there = ["onnxscript", "onnxsim"]
    went.clear()

    def attempt(tool: str, source: Path, target: Path, _: Any) -> str:
        went.append((tool, onnx.load(source).producer_name))
        made = onnx.load(source)
        made.producer_name += tool
        onnx.save(made, target)
        return ""

    monkeypatch.setattr("normfuse.first._attempt", attempt)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in there else None)
    return there


def given(monkeypatch: pytest.MonkeyPatch, times: Mapping[str, Sequence[float]], inputs: int = 2) -> None:
    """Let files have these times, turn by turn, on each of so many inputs."""

    def measure(files: Sequence[Any], feeds: Sequence[Any], *_: object) -> None:
        assert {f.name for f in files} == set(times) and len(feeds) == inputs
        for file in files:
            file.medians = [list(times[file.name]) for _ in feeds]

    monkeypatch.setattr(fastest, "_measure", measure)
    monkeypatch.setattr(fastest, "RESTARTS", len(next(iter(times.values()))))


def chosen(report: normfuse.Report) -> str:
    assert report.fastest is not None
    (name,) = [f["name"] for f in report.fastest["files"] if f["chosen"]]
    assert report.notes[0] == (f"of {len(report.fastest['files'])} files, the fastest on cpu is the model {name}")
    return str(name)


NAMES = ("as it is", PLAIN, SCRIPT, SIM, BOTH)
CASES: dict[str, tuple[str, list[Sequence[float]]]] = {
    "the rewritten one": (PLAIN, [(2, 2, 2), (1, 1, 1), (3, 3, 3), (2, 2, 2), (4, 4, 4)]),
    "after one": (SIM, [(2, 2, 2), (2, 2, 2), (3, 3, 3), (1, 1, 1), (4, 4, 4)]),
    "after both": (BOTH, [(2, 2, 2), (2, 2, 2), (3, 3, 3), (2, 2, 2), (1, 1, 1)]),
    "but once": (SCRIPT, [(9, 9, 9), (2, 2, 2), (1, 1, 2.1), (3, 3, 3), (4, 4, 4)]),
    "but twice": (PLAIN, [(9, 9, 9), (2, 2, 2), (1, 2.1, 2.1), (3, 3, 3), (4, 4, 4)]),
    "the best is not the surest": (SIM, [(9, 9, 9), (3, 3, 3), (0.1, 4, 4), (2, 2, 2), (4, 4, 4)]),
    "none": ("as it is", [(1, 1, 1), (2, 2, 2), (3, 3, 3), (2, 2, 2), (4, 4, 4)]),
    "none, but once": ("as it is", [(1, 1, 3), (2, 2, 2), (3, 3, 3), (9, 9, 9), (4, 4, 4)]),
    "none, but twice": (PLAIN, [(1, 3, 3), (2, 2, 2), (4, 4, 4), (9, 9, 9), (4, 4, 4)]),
}


@pytest.mark.parametrize("case", CASES)
def test_which_is_chosen(case: str, model: Path, tools: list[str], tmp_path: Path,
                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    name, times = CASES[case]
    given(monkeypatch, dict(zip(NAMES, times, strict=True)))
    out, again = tmp_path / "out.onnx", tmp_path / "again.onnx"
    report = normfuse.rewrite(model, out, Config(first="fastest", target="normfuse"))
    assert chosen(report) == name
    if name == "as it is":
        assert out.read_bytes() == model.read_bytes() and not report.fused and report.rewritten
        assert {(n.action, n.reason) for n in report.norms} == {("left", "the model is faster as it is")}
        assert report.operators_after == report.operators_before and report.nodes_after == report.nodes_before
        assert "first='fastest'" in report.replay
        return
    first = name.removeprefix("rewritten").removeprefix(" after ")
    plain = normfuse.rewrite(model, again, Config(first=first, target="normfuse"))
    assert out.read_bytes() == again.read_bytes() and report.fused == 1
    assert went[:3] == [("onnxscript", ""), ("onnxsim", ""), ("onnxsim", "onnxscript")]
    assert len(went) == 3 + bool(first) + first.count(",")  # each went once for all choices and the one that was made
    assert report.notes[1:] == plain.notes
    assert f"first={first!r}" in report.replay  # which chooses no more


def test_several_inputs_count_alike(model: Path, tools: list[str], monkeypatch: pytest.MonkeyPatch,
                                    tmp_path: Path) -> None:  # fmt: skip
    """Faster by a half on one and slower by a quarter on the other is faster; how long they take does not matter."""
    tools.remove("onnxscript")

    def measure(files: Sequence[Any], *_: object) -> None:
        for file, times in zip(files, [(2, 2000), (1, 1000), (0.5, 1250)], strict=True):
            file.medians = [[time] * fastest.RESTARTS for time in times]

    monkeypatch.setattr(fastest, "_measure", measure)
    report = normfuse.rewrite(model, tmp_path / "out.onnx", Config(first="fastest"))
    assert chosen(report) == SIM
    assert report.fastest is not None and report.fastest["files"][2]["ratio"] == [0.25, 0.625]


def test_what_is_measured(model: Path, tools: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn with new sessions, all files in it; on one token and on 512."""
    monkeypatch.setattr(fastest, "RESTARTS", 2)
    monkeypatch.setattr(fastest, "SECONDS", 0.01)
    opened: list[str] = []
    session = fastest._session

    def seen(file: Any, *a: Any) -> Any:
        opened.append(file.name)
        return session(file, *a)

    monkeypatch.setattr(fastest, "_session", seen)
    report = normfuse.rewrite(model, tmp_path / "out.onnx", Config(first="fastest", target="ort-cpu"))
    chosen(report)
    names = ["as it is", PLAIN, SCRIPT, SIM, BOTH]
    assert opened == [*names, *names, *names[1:], names[0]]  # tried, and in two turns
    found = report.fastest
    assert found is not None and [f["name"] for f in found["files"]] == names
    assert found["inputs"] == [{"x": [1, 1, 16], "r": [1, 1, 16]}, {"x": [1, 512, 16], "r": [1, 512, 16]}]
    assert all(t > 0 for f in found["files"] for t in f["milliseconds"]) and found["provider"] == "cpu"
    assert found["files"][0]["ratio"] == [1.0, 1.0] and report.seconds["first"] > 0


def test_sizes_and_threads(model: Path, tools: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest, "RESTARTS", 1)
    how = How(threads=1, rounds=3, sizes={"b": 2, "s": 5})
    report = normfuse.rewrite(model, tmp_path / "out.onnx", Config(first="fastest"), how=how)
    assert report.fastest is not None and report.fastest["threads"] == 1
    assert report.fastest["inputs"] == [{"x": [2, 5, 16], "r": [2, 5, 16]}]
    with pytest.raises(InputError, match="no size of an input is named 'q'; the model has b, s"):
        normfuse.rewrite(model, tmp_path / "no.onnx", Config(first="fastest"), how=How(sizes={"q": 2}))
    np.savez(tmp_path / "in.npz", x=np.ones((1, 3, 16), np.float32), r=np.ones((1, 3, 16), np.float32))
    how = How(rounds=3, inputs=str(tmp_path / "in.npz"))
    report = normfuse.rewrite(model, tmp_path / "other.onnx", Config(first="fastest"), how=how)
    assert report.fastest is not None and report.fastest["inputs"] == [{"x": [1, 3, 16], "r": [1, 3, 16]}]


def test_what_the_target_cannot_have_or_is_not_there_is_not_tried(
    model: Path, tools: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    given(monkeypatch, {"as it is": [2], PLAIN: [1], SIM: [3]})
    assert chosen(normfuse.rewrite(model, tmp_path / "a.onnx", Config(first="fastest"))) == PLAIN
    tools.clear()
    given(monkeypatch, {"as it is": [2], PLAIN: [1]})
    config = Config(first="fastest", target="normfuse")
    assert chosen(normfuse.rewrite(model, tmp_path / "b.onnx", config)) == PLAIN


def test_an_optimiser_that_fails_is_told(model: Path, tools: list[str], tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("normfuse.first._attempt", lambda tool, *_: f"{tool} is broken")
    given(monkeypatch, {"as it is": [2], PLAIN: [1]})
    report = normfuse.rewrite(model, tmp_path / "out.onnx", Config(first="fastest", target="normfuse"))
    assert report.notes[1:3] == ["onnxscript did not go first: onnxscript is broken",
                                 "onnxsim did not go first: onnxsim is broken"]  # fmt: skip


def test_a_file_that_does_not_run_as_it_is_measured_is_told(model: Path, tools: list[str], tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    session = fastest._session

    def broken(file: Any, *a: Any) -> Any:
        if file.first == "onnxscript":
            raise InputError("ONNX Runtime does not load it")
        return session(file, *a)

    monkeypatch.setattr(fastest, "_session", broken)
    given(monkeypatch, {"as it is": [2], PLAIN: [1], SIM: [3], BOTH: [3]})
    report = normfuse.rewrite(model, tmp_path / "out.onnx", Config(first="fastest", target="normfuse"))
    assert report.notes[1] == f"{SCRIPT}, it does not run: ONNX Runtime does not load it"


def test_a_model_without_norms_after_which_nothing_is_faster(tools: list[str], tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    source, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    onnx.save(lines_model("y = Add(x, r)", "y"), source)
    given(monkeypatch, {"as it is": [1], SIM: [2]}, inputs=1)
    report = normfuse.rewrite(source, out, Config(first="fastest"))
    assert chosen(report) == "as it is" and out.read_bytes() == source.read_bytes() and not report.norms


@pytest.mark.parametrize("name", ["bert", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_a_family(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured, with the optimisers that are installed; whatever is chosen computes the same."""
    monkeypatch.setattr(fastest, "RESTARTS", 1)
    monkeypatch.setattr(fastest, "SECONDS", 0.05)
    source, out = cached_export(name, 18, dynamic=True), tmp_path / "out.onnx"
    report = normfuse.rewrite(source, out, Config(first="fastest", target="normfuse", verify="model"))
    files = report.fastest["files"] if report.fastest else []
    assert chosen(report) in {f["name"] for f in files} >= {"as it is", PLAIN, SCRIPT}
    assert compare_models(source, out)["equal"]


def test_an_export(tools: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, {"as it is": [2], PLAIN: [2], SIM: [1]}, inputs=1)
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.RMSNorm(8)).eval()
    out = tmp_path / "out.onnx"
    report = normfuse.export(net, (torch.randn(2, 8),), out, Config(first="fastest", verify="model"))
    assert chosen(report) == SIM and report.fused == 1 and onnx.load(out).producer_name.endswith("onnxsim")
    given(monkeypatch, {"as it is": [1], PLAIN: [2], SIM: [3]}, inputs=1)
    report = normfuse.export(net, (torch.randn(2, 8),), out, Config(first="fastest"), overwrite=True)
    assert chosen(report) == "as it is" and not report.fused
    assert not {"RMSNormalization", "rms_norm"} & {n.op_type for n in onnx.load(out).graph.node}


# -- by the command line ----------------------------------------------------------------------------------------------


def test_the_option(model: Path, tools: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, {"as it is": [2.5], PLAIN: [1.25], SIM: [3]})
    out, page = tmp_path / "out.onnx", tmp_path / "page.html"
    code, text, _ = run("rewrite", model, out, "--first", "fastest", "--report", page)
    assert code == 0
    table = [line.split("  ") for line in text.splitlines() if line.startswith(("as it is", "rewritten"))]
    rows = [[cell.strip() for cell in line if cell.strip()] for line in table]
    assert rows == [["as it is", "2.5 (1.000)", "2.5 (1.000)", "-"],
                    [PLAIN, "1.25 (0.500)", "1.25 (0.500)", "chosen"],
                    [SIM, "3 (1.200)", "3 (1.200)", "-"]]  # fmt: skip
    assert "MS, 1X1X16, 1X1X16" in text and "MS, 1X512X16, 1X512X16" in text
    told = "of 3 files, the fastest on cpu is the model rewritten"
    shown = page.read_text(encoding="utf-8")
    assert f"note: {told}" in text and told in shown
    assert "1.25 (0.500)" in shown and "ms, 1x512x16, 1x512x16" in shown
    data = json.loads(run("rewrite", model, out, "--overwrite", "--first", "fastest", "--json")[1])
    assert [f["first"] for f in data["summary"]["fastest"]["files"]] == [None, "", "onnxsim"] and data["fused"] == 1
    given(monkeypatch, {"as it is": [2.5], PLAIN: [1.25], SIM: [3]}, inputs=1)
    data = json.loads(run("rewrite", model, out, "--overwrite", "--first", "fastest", "--json", "--size", "b=4")[1])
    assert data["summary"]["fastest"]["inputs"] == [{"x": [4, 2, 16], "r": [4, 2, 16]}]


def test_where_it_has_no_meaning(model: Path, tools: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    with pytest.raises(UnsupportedError, match="needs files"):
        normfuse.optimize(onnx.load(model), Config(first="fastest"))
    with pytest.raises(InputError, match="'approximate' does not give; name the optimisers"):
        Config(first="fastest", layernorm_to_rmsnorm="approximate")
    with pytest.raises(InputError, match="'fastest' is not known; choose of onnxscript, onnxsim, or 'fastest' alone"):
        Config(first="fastest,onnxsim")
    line = fails(run("rewrite", model, out, "--first", "fastest", "--size", "q=3"))
    assert "no size of an input is named 'q'; the model has b, s" in line
    if "CUDAExecutionProvider" not in normfuse.cli_env.sessions_have():
        line = fails(run("rewrite", model, out, "--first", "fastest", "--target", "ort-cuda"))
        assert "ONNX Runtime has no CUDA here; do it where it has, or name the optimisers" in line
    assert not out.exists()
    for config in (Config(), Config(first="onnxsim")):
        with pytest.raises(InputError, match=r"how= says how first='fastest' measures, and first is '(onnxsim)?'"):
            normfuse.rewrite(model, out, config, how=How())
        with pytest.raises(InputError, match="how= says how"):
            normfuse.export(torch.nn.RMSNorm(8), (torch.randn(2, 8),), out, config, how=How())
    with pytest.raises(InputError, match="how= is for ONNX models"):
        normfuse.rewrite(tmp_path / "model.pt2", tmp_path / "out.pt2", how=How())


def test_a_model_that_runs_on_no_random_inputs(tools: list[str], tmp_path: Path) -> None:
    source, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    text = "k = Constant<value_ints = [7, 16]>() q = Reshape(x, k) " + rms("q", "n") + "y = Add(n, q)"
    onnx.save(lines_model(text, "y", shape="b,16"), source)
    line = fails(run("rewrite", source, out, "--first", "fastest"))
    assert "does not run on random inputs" in line and "give sizes, by --size NAME=N" in line and not out.exists()
    assert run("rewrite", source, out, "--first", "fastest", "--size", "b=7", "--json")[0] == 0
    np.savez(tmp_path / "in.npz", x=np.ones((3, 16), np.float32), r=np.ones((3, 16), np.float32))
    how = How(inputs=str(tmp_path / "in.npz"))
    with pytest.raises(InputError, match=r"model\.onnx does not run on .*in\.npz: "):
        normfuse.rewrite(source, out, Config(first="fastest"), how=how, overwrite=True)
