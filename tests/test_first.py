"""Optimisers of others that go first: what they make is kept where the model computes the same, and left out otherwise.

Most of it is tried with an onnxsim of our own, so that it can go wrong in every way.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnxscript.rewriter.ort_fusions import optimize_for_ort

import normfuse
from normfuse import Config, first, sessions
from normfuse.errors import InputError, UnsupportedError, VerificationError
from normfuse.io import files
from normfuse.report import Report
from normfuse.sessions import Given, longest, session
from normfuse.verify import compare_models
from tests.cli_tools import fails, run
from tests.families import FAMILIES, cached_export
from tests.onnx_lines import model as lines_model
from tests.onnx_lines import rms
from tests.share import share

Install = Callable[[str], None]
SAME = "return model, True"
WRONG_SUM = "model.graph.node[-1].op_type = 'Sub'\n    return model, True"
FOLD = "model.graph.node.remove(next(n for n in model.graph.node if n.op_type == 'Identity'))\n    return model, True"
"""Takes away the node "i", whose result nobody reads."""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts an onnxsim in place whose `simplify` has this body."""
    folder = tmp_path / "packages"
    folder.mkdir()

    def put(body: str) -> None:
        (folder / "onnxsim.py").write_text(f"import os, signal, sys, time\ndef simplify(model):\n    {body}\n")

    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
    return put


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(lines_model("i = Identity(x) " + rms("x", "n") + "y = Add(n, r)", "y"), path)
    return path


def first_note(report: Report) -> str:
    return next(note for note in report.notes if note.startswith("onnxs"))


def test_what_it_made_is_rewritten(install: Install, model: Path, tmp_path: Path) -> None:
    install(FOLD)
    out = tmp_path / "out.onnx"
    report = normfuse.rewrite(model, out, Config(first="onnxsim", verify="model"))
    assert report.notes[0] == "onnxsim went first: operators 8 -> 7, outputs equal"
    assert (report.nodes_before, report.fused) == (8, 1) and report.operators_before["Identity"] == 1
    assert report.seconds["first"] > 0 and report.source == str(model)
    assert "Identity" not in {n.op_type for n in onnx.load(out).graph.node}
    assert report.model_check is not None and report.model_check["equal"]
    assert "first='onnxsim'" in report.replay
    normfuse.rewrite(model, tmp_path / "plain.onnx")
    assert "Identity" in {n.op_type for n in onnx.load(tmp_path / "plain.onnx").graph.node}


WRONG = {
    "other outputs": (WRONG_SUM, "differs"),
    "raises": ("raise KeyError('no\\nsuch thing')", "KeyError"),
    "crashes": ("os.kill(os.getpid(), signal.SIGSEGV)", "it was ended by SIGSEGV"),
    "leaves": ("os._exit(0)", "it wrote nothing"),
    "no model": ("model.Clear()\n    return model, True", "the file is empty"),
    "does not load": ("model.graph.node[0].op_type = 'Nonsense'\n    return model, True", "does not load it"),
    "not valid": ("model.graph.input[0].name = 'other'\n    return model, True", "nothing computes 'x'"),
    "other inputs": ("model.graph.input.add().CopyFrom(model.graph.input[0])\n    model.graph.input[2].name = 'z'\n"
                     "    return model, True", "other inputs"),
    "hangs": ("time.sleep(60)", "it took more than"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_goes_wrong_is_left_out_and_told(install: Install, model: Path, tmp_path: Path, what: str,
                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    body, told = WRONG[what]
    install(body)
    if what == "hangs":
        monkeypatch.setattr(first, "SECONDS", 1.5)
    made, plain = tmp_path / "made.onnx", tmp_path / "plain.onnx"
    report = normfuse.rewrite(model, made, Config(first="onnxsim"))
    note = first_note(report)
    assert note.startswith("onnxsim did not go first: ") and told in note and "\n" not in note
    assert str(tmp_path) not in note and "/tmp" not in note and "nothing was written" not in note
    normfuse.rewrite(model, plain)
    assert made.read_bytes() == plain.read_bytes()


SLICED = """n = model.graph.node.add()
    n.op_type = 'Slice'
    n.input.extend(['t', 'zero', 'most', 'one'])
    n.output.append('y')
    model.graph.node[-2].output[0] = 't'
    return model, True"""


@pytest.mark.parametrize(("shape", "told"), [("b,s,16", True), ("2,3,16", False)])
def test_what_differs_on_longer_inputs_only_is_told(install: Install, tmp_path: Path, shape: str, told: bool) -> None:
    """The result leaves out what is behind the 99th token; inputs are 130 long where that is open."""
    install(SLICED)
    made = lines_model(rms("x", "n") + "y = Add(n, r)", "y", shape=shape)
    made.graph.initializer.extend(onnx.numpy_helper.from_array(np.array([v]), k)
                                  for k, v in {"zero": 0, "most": 99, "one": 1}.items())  # fmt: skip
    source = tmp_path / "model.onnx"
    onnx.save(made, source)
    note = first_note(normfuse.rewrite(source, tmp_path / "out.onnx", Config(first="onnxsim")))
    assert ("did not go first: its result: output 'y' is float32 of shape" in note) is told, note


def test_a_model_too_short_for_long_inputs_is_compared_on_shorter_ones(install: Install, tmp_path: Path) -> None:
    made = lines_model(
        "k = Shape(x) at = Constant<value_int = 1>() l = Gather(k, at) start = Constant<value_int = 0>() "
        "q = Range(start, l, at) h = Constant<value_ints = [40, 16]>() table = ConstantOfShape(h) "
        "t = Gather(table, q) a = Add(x, t) " + rms("a", "n") + "y = Add(n, r)", "y", shape="b,s,16")  # fmt: skip
    source = tmp_path / "model.onnx"
    onnx.save(made, source)
    (longer,) = first._longer(source, Given())
    assert {a.shape for a in longer.inputs.values()} == {(1, 33, 16)}
    install(SAME)
    assert "went first" in first_note(normfuse.rewrite(source, tmp_path / "out.onnx", Config(first="onnxsim")))


@pytest.mark.parametrize(("free", "most"), [(52_800, 132), (52_799, 33), (13_200, 33), (13_199, None), (10**9, 512)])
def test_longer_inputs_where_there_is_memory(free: int, most: int | None, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A run of n tokens leaves 100 n bytes in memory, and so it will in each of two sessions; half of it has to do."""
    source, left = tmp_path / "open.onnx", [0]
    onnx.save(lines_model(rms("x", "n") + "y = Add(n, r)", "y", shape="b,s,16"), source)
    runtime = session(source)

    class Counted:
        get_inputs = runtime.get_inputs

        def run(self, names: None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            left[0] = max(left[0], 100 * feeds["x"].shape[1])
            return []

    monkeypatch.setattr(sessions, "resident", lambda: left[0])
    monkeypatch.setattr(sessions, "available", lambda: free)
    feeds = longest(Counted(), (33, 132, 512), 2)
    assert (feeds["x"].shape[1] if feeds else None) == most


def test_longer_inputs_of_a_size_that_can_be_held(tmp_path: Path) -> None:
    source = tmp_path / "open.onnx"
    onnx.save(lines_model("y = Add(x, r)", "y", shape="b,c,h,w"), source)
    feeds = longest(session(source), (33, 130, 512), 2)
    assert feeds is not None and feeds["x"].shape == (1, 33, 33, 33)  # 130 would be 4.4 million elements of two


def test_a_second_one_gets_what_the_first_has_made_and_the_input_where_that_was_wrong(
    install: Install, model: Path, tmp_path: Path) -> None:  # fmt: skip
    install(WRONG_SUM)
    both = normfuse.rewrite(model, tmp_path / "a.onnx", Config(first="onnxsim, onnxscript", target="normfuse"))
    assert [n.split(":")[0] for n in both.notes[:2]] == ["onnxsim did not go first", "onnxscript went first"]
    assert both.notes[1].startswith("onnxscript went first: operators 8 -> ")
    install(FOLD)
    both = normfuse.rewrite(model, tmp_path / "b.onnx", Config(first="onnxsim, onnxscript", target="normfuse"))
    assert both.notes[1].startswith("onnxscript went first: operators 7 -> ")


def test_attention_fused_by_onnxscript_and_its_norms_by_us(tmp_path: Path) -> None:
    source, out = cached_export("bert", 18), tmp_path / "out.onnx"
    report = normfuse.rewrite(source, out, Config(first="onnxscript", target="normfuse", verify="model"))
    made = {n.op_type for n in onnx.load(out).graph.node}
    assert "Attention" in made and any(name.startswith("bias_add_layer_norm") for name in made), made
    assert "SkipLayerNormalization" not in made
    assert "qk" not in {n.placement for n in report.norms}  # its Attention projects
    assert compare_models(source, out)["equal"]


def test_a_model_that_onnxscript_breaks_is_rewritten_as_it_is(tmp_path: Path) -> None:
    source, config = cached_export("gpt2", 18), Config(target="normfuse")
    plain = normfuse.rewrite(source, tmp_path / "plain.onnx", config)
    report = normfuse.rewrite(source, tmp_path / "out.onnx", Config(target="normfuse", first="onnxscript"))
    assert first_note(report).startswith("onnxscript did not go first: its result: ONNX Runtime does not load it")
    assert report.notes[1:] == plain.notes and report.nodes_before == plain.nodes_before
    assert (tmp_path / "plain.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()


@pytest.mark.parametrize("name", share((name for name in FAMILIES if name != "gpt2"), 2))
def test_after_onnxscript_all_norms_of_a_family_are_there(name: str) -> None:
    """As operators of ONNX Runtime some of them, with additions in them, and attention in one operator beside them."""
    family = FAMILIES[name]
    model, _ = optimize_for_ort(ir.load(cached_export(name, 18)))
    report = normfuse.optimize(model, Config(target="normfuse"))[1]
    assert dict(Counter(n.placement for n in report.norms)) == family.placements
    assert not report.refusals and {n.action for n in report.norms} <= {"fused", "kept"}
    assert not any(n.reason for n in report.norms)


@pytest.mark.parametrize("name", ["vit", "phi"])
def test_layernorms_beside_the_attention_that_it_made(name: str, tmp_path: Path) -> None:
    """onnxscript's attention is an operator that only ONNX Runtime computes."""
    config = Config(target="normfuse", first="onnxscript", layernorm_to_rmsnorm="exact", verify="model")
    report = normfuse.rewrite(cached_export(name, 18), tmp_path / "out.onnx", config)
    assert report.converted == len(report.norms) == FAMILIES[name].norms and not report.refusals
    assert any("the certificate computes no" in note for note in report.notes)


def test_large_weights_lie_beside_the_result(install: Install, model: Path, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    install(SAME)
    monkeypatch.setattr(files, "INLINE", 16)
    monkeypatch.setattr(files, "SMALL", 16)
    out = tmp_path / "out.onnx"
    normfuse.rewrite(model, out, Config(first="onnxsim"))
    assert [p.suffix for p in tmp_path.iterdir() if p.name.startswith("out")] != [".onnx"]
    assert any(t.external_data for t in onnx.load(out, load_external_data=False).graph.initializer)
    assert compare_models(model, out)["equal"]
    notes = normfuse.rewrite(model, model, Config(first="onnxsim"), in_place=True).notes
    assert not any("is not read by the model" in note for note in notes)  # of what was made on the way


def test_a_model_with_data_beside_it(install: Install, model: Path, tmp_path: Path) -> None:
    install(FOLD)
    source = tmp_path / "external.onnx"
    ir.save(ir.load(model), source, external_data="external.data", size_threshold_bytes=32)
    report = normfuse.rewrite(source, tmp_path / "out.onnx", Config(first="onnxsim"))
    assert first_note(report) == "onnxsim went first: operators 8 -> 7, outputs equal"
    assert compare_models(source, tmp_path / "out.onnx")["equal"]


def test_a_model_that_is_too_large_for_them(install: Install, model: Path, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    install("raise AssertionError('this should not run')")
    monkeypatch.setattr(first, "LIMIT", 16)
    note = first_note(normfuse.rewrite(model, tmp_path / "out.onnx", Config(first="onnxsim")))
    assert note == "onnxsim did not go first: the model has 0.0 GiB of weights, and it takes models of less than 2"


def test_what_is_not_fused_is_still_what_it_made(install: Install, tmp_path: Path) -> None:
    install(FOLD)
    source, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    onnx.save(lines_model("i = Identity(x) y = Add(x, r)", "y"), source)
    report = normfuse.rewrite(source, out, Config(first="onnxsim"))
    assert not report.norms and [n.op_type for n in onnx.load(out).graph.node] == ["Add"]
    normfuse.rewrite(source, source, Config(first="onnxsim"), in_place=True)
    assert [n.op_type for n in onnx.load(source).graph.node] == ["Add"]


def test_the_result_is_compared_with_the_input_as_well(install: Install, model: Path, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """verify="model" compares with the model that was given, not with what an optimiser has made of it."""
    install(WRONG_SUM)
    monkeypatch.setattr(first, "difference", lambda *_: "")  # so that the wrong result is kept
    seen: list[Path] = []

    def check(source: Path, *_: object) -> None:
        seen.append(source)
        raise VerificationError("different")

    monkeypatch.setattr("normfuse.api._check_file", check)
    with pytest.raises(VerificationError):
        normfuse.rewrite(model, tmp_path / "out.onnx", Config(first="onnxsim", verify="model"))
    assert seen == [model] and not (tmp_path / "out.onnx").exists()


def test_an_export(install: Install, tmp_path: Path) -> None:
    install("model.producer_name = 'mine'\n    return model, True")
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.RMSNorm(8), torch.nn.Linear(8, 8)).eval()
    args, out = (torch.randn(2, 8),), tmp_path / "out.onnx"
    report = normfuse.export(net, args, out, Config(first="onnxsim", verify="model"))
    assert first_note(report).startswith("onnxsim went first") and report.fused == 1
    assert onnx.load(out).producer_name == "mine"
    (found,) = session(out).run(None, {session(out).get_inputs()[0].name: args[0].numpy()})
    np.testing.assert_allclose(found, net(*args).detach().numpy(), rtol=1e-5, atol=1e-5)


# -- by the command line ----------------------------------------------------------------------------------------------


def test_the_option(install: Install, model: Path, tmp_path: Path) -> None:
    install(FOLD)
    out, page = tmp_path / "out.onnx", tmp_path / "page.html"
    code, text, _ = run("rewrite", model, out, "--first", "onnxsim", "--report", page)
    assert code == 0
    assert "note: onnxsim went first: operators 8 -> 7, outputs equal" in text and "operators 8 -> 2" in text
    assert "onnxsim went first" in page.read_text(encoding="utf-8")
    data = json.loads(run("rewrite", model, out, "--overwrite", "--first", "onnxsim", "--json")[1])
    assert data["summary"]["notes"][0].startswith("onnxsim went first") and data["nodes_before"] == 8


@pytest.mark.parametrize(("runs", "told"), [
    ("", "onnxsim went first: operators 8 -> 7, outputs equal"),
    (None, "onnxsim went first: operators 8 -> 7, outputs equal on the CPU; there is no CUDA here to try it on"),
    ("it does not run on CUDA: no kernel", "onnxsim did not go first: its result: it does not run on CUDA: no kernel"),
])  # fmt: skip
def test_what_goes_first_for_cuda_is_tried_there(install: Install, model: Path, tmp_path: Path, runs: str | None,
                                                 told: str, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    install(FOLD)
    monkeypatch.setattr(first, "cuda", lambda path, given: runs)
    out = tmp_path / "out.onnx"
    report = normfuse.rewrite(model, out, Config(first="onnxsim", target="ort-cuda", ort_version="1.31"))
    assert first_note(report) == told
    report = normfuse.rewrite(model, out, Config(first="onnxsim", target="ort-cpu"), overwrite=True)
    assert first_note(report) == "onnxsim went first: operators 8 -> 7, outputs equal"


def test_how_it_is_tried(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normfuse.cli_env.sessions_have", lambda: ["CPUExecutionProvider"])
    assert first.cuda(model, Given()) is None
    monkeypatch.setattr("normfuse.cli_env.sessions_have", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():  # the build for GPUs
        assert first.cuda(model, Given()) == ""  # a machine without CUDA gives a session of the CPU
    broken = onnx.load(model)
    broken.graph.node[0].op_type = "Nonsense"
    onnx.save(broken, tmp_path / "broken.onnx")
    found = first.cuda(tmp_path / "broken.onnx", Given())
    assert found is not None and found.startswith("it does not run on CUDA: ") and "\n" not in found


def test_what_cannot_be() -> None:
    with pytest.raises(InputError, match="which not every runtime has; choose another target"):
        Config(first="onnxscript")
    with pytest.raises(InputError, match="'polygraphy' is not known; choose of onnxscript, onnxsim"):
        Config(first="onnxsim,polygraphy")


def test_an_optimiser_that_is_not_there(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = fails(run("rewrite", model, tmp_path / "out.onnx", "--first", "onnxsim"))
    assert "onnxsim is not installed; pip install onnxsim" in line and not (tmp_path / "out.onnx").exists()
    with pytest.raises(InputError, match="not installed"):
        normfuse.export(torch.nn.Linear(2, 2), (torch.ones(2),), tmp_path / "out.onnx", Config(first="onnxsim"))


def test_where_it_has_no_meaning(install: Install, model: Path, tmp_path: Path) -> None:
    install(SAME)
    with pytest.raises(UnsupportedError, match="needs files"):
        normfuse.optimize(onnx.load(model), Config(first="onnxsim"))
    with pytest.raises(InputError, match="leave external_data='reference' out"):
        normfuse.rewrite(model, tmp_path / "out.onnx", Config(first="onnxsim"), external_data="reference")
    program = tmp_path / "program.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(2),)), program)
    with pytest.raises(InputError, match="is for ONNX models"):
        normfuse.rewrite(program, tmp_path / "out.pt2", Config(first="onnxsim"), trust=True)
