"""LayerNorm to RMSNorm, exactly, on models of transformers: rulings, errors, and that the certificate sees it all."""

from __future__ import annotations

import copy
import importlib.util
import io
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import normfuse
from normfuse.config import Config
from normfuse.conversion import Conversion
from normfuse.convert import LIMIT
from normfuse.folding import Folder
from normfuse.frontends import fx_convert
from normfuse.nn import RMSNorm
from normfuse.report import Report
from normfuse.sessions import session
from tests.families import cached
from tests.layernorm_models import CASES, Case, to_onnx

EXACT = Config(layernorm_to_rmsnorm="exact")
TIED = {"bloom": (7, 8, 1), "mbart": (17, 19, 2), "bert": (0, 8, 0), "clip_vision_hidden": (1, 8, 0)}
"""Where a program of torch differs from an export to ONNX: the table of an embedding norm is the output layer's too,
and dead norms are still there."""
UNTIED = {"gpt2": 0, "opt": 0, "falcon": 0, "starcoder2": 0, "whisper": 1}
"""Operators where the exporter has made a transposed copy of a tied table."""
FAST = ("gpt2", "dinov2", "bloom", "clip_vision_hidden", "convnext", "bert")
PROGRAMS, FILES = ([pytest.param(name, marks=() if name in FAST[turn::2] else pytest.mark.slow) for name in CASES]
                   for turn in (0, 1))  # fmt: skip


def program(case: Case, dtype: torch.dtype = torch.float32) -> Any:
    module, args = case.build().to(dtype), case.inputs()
    args = tuple(a.to(dtype) if a.is_floating_point() else a for a in args)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(module, args, strict=False)


def counts(report: Report) -> tuple[int, int, int]:
    norms = report.to_dict()["norms"]
    done = [n for n in norms if n["action"] == "converted"]
    places = {place for n in done for place in n["conversion"]["operators"]}
    return len(done), sum(n["kind"] == "layer_norm" for n in norms), len(places)


def relative(want: torch.Tensor, got: torch.Tensor) -> float:
    return float((want.double() - got.double()).norm() / want.double().norm())


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_ruling_on_an_exported_program(name: str) -> None:
    case = CASES[name]
    source = program(case)
    with torch.no_grad():
        want = source.module()(*case.inputs())
    before = {k: v.clone() for k, v in source.state_dict.items()}
    result, report = normfuse.optimize(source, EXACT)
    assert counts(report) == TIED.get(name, (case.converted, case.norms, case.operators))
    assert all(torch.equal(v, before[k]) for k, v in source.state_dict.items())
    done = [n for n in report.to_dict()["norms"] if n["action"] == "converted"]
    for norm in done:
        proof = norm["conversion"]
        assert proof["check"]["max_rel"] <= LIMIT
        assert proof["check"]["constants"] > 10
        assert proof["derivation"] or proof["operators"] or proof["edits"]
        assert norm["verified"]
        assert "norm" in norm["emitted"]
        error = proof["check"]
        assert error["error_after"] <= 2 * error["error_before"]
    assert all(n["conversion"]["reason"] for n in report.to_dict()["norms"] if n["action"] != "converted"
               and n["kind"] == "layer_norm")  # fmt: skip
    with torch.no_grad():
        assert relative(want, result.module()(*case.inputs())) < 1e-5


@pytest.mark.parametrize("name", FILES)
def test_the_ruling_on_an_onnx_model(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    source = cached(f"layernorm-{name}", lambda path: to_onnx(case.build(), case.inputs()).save(path))
    report = normfuse.rewrite(source, tmp_path / "out.onnx", Config(layernorm_to_rmsnorm="exact", verify="model"))
    assert counts(report) == (case.converted, case.norms, UNTIED.get(name, case.operators))
    assert report.model_check is not None
    assert report.model_check["equal"]
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
    data = report.to_dict()
    assert data["converted"] == case.converted
    assert all(n["conversion"]["check"]["max_rel"] <= LIMIT for n in data["norms"] if n["action"] == "converted")
    again = normfuse.optimize(tmp_path / "out.onnx", EXACT)[1]
    assert again.converted == 0


@pytest.mark.parametrize(("name", "dtype", "limit"), [
    ("gpt2", torch.float64, 1e-12), ("gpt2", torch.bfloat16, 1.6),
    pytest.param("vit", torch.float64, 1e-12, marks=pytest.mark.slow),
    pytest.param("vit", torch.bfloat16, 1.6, marks=pytest.mark.slow),
    pytest.param("dinov2", torch.bfloat16, 1.6, marks=pytest.mark.slow),
    pytest.param("gpt_neox", torch.bfloat16, 1.6, marks=pytest.mark.slow),
    pytest.param("clip_vision_pooled", torch.bfloat16, 1.6, marks=pytest.mark.slow),
    pytest.param("opt", torch.bfloat16, 1.6, marks=pytest.mark.slow),
])  # fmt: skip
def test_errors_in_other_types(name: str, dtype: torch.dtype, limit: float) -> None:
    case = CASES[name]
    source = program(case, dtype)
    _, report = normfuse.optimize(source, EXACT)
    assert counts(report)[0] == case.converted
    error = next(n for n in report.to_dict()["norms"] if n["action"] == "converted")["conversion"]["check"]
    if dtype == torch.float64:
        assert error["error_after"] <= max(limit, 2 * error["error_before"])  # ViT has its softmax in float32
    else:
        assert error["error_after"] <= limit * error["error_before"]


# -- the certificate sees every edit ----------------------------------------------------------------------------------


def _edits(plan: Conversion) -> list[tuple[str, int, int]]:
    out = [("edit", i, 0) for i in range(len(plan.edits))] + [("operator", i, 0) for i in range(len(plan.operators))]
    return out + [("fold", i, j) for i, (_, _, found) in enumerate(plan.folds) for j in range(len(found))]


def _without(plan: Conversion, which: tuple[str, int, int]) -> None:
    kind, i, j = which
    if kind == "edit":
        del plan.edits[list(plan.edits)[i]]
    elif kind == "operator":
        del plan.operators[list(plan.operators)[i]]
    else:
        plan.folds[i][2][j] = replace(plan.folds[i][2][j], bias=None)


@pytest.mark.parametrize("name", [
    "bloom",
    *(pytest.param(n, marks=pytest.mark.slow) for n in
      ("gpt2", "dinov2", "vit", "whisper", "clip_vision_pooled", "opt", "phi", "swin")),
])  # fmt: skip
def test_leaving_out_any_edit_fails_the_certificate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = program(CASES[name])
    run: Callable[..., None] = Folder.run
    plans: list[Conversion] = []

    def watched(self: Folder, *args: Any) -> None:
        run(self, *args)
        plans.append(self.plan)
        if which is not None:
            _without(self.plan, which)

    monkeypatch.setattr(Folder, "run", watched)
    which: tuple[str, int, int] | None = None
    assert fx_convert.convert_program(source, EXACT)[1].plan is not None
    edits = _edits(plans[0])
    assert len(edits) > 8
    for which in edits:
        found = fx_convert.convert_program(source, EXACT)[1]
        assert found.plan is None, which
        assert all("differ" in r.reason for r in found.records if r.code == "NF304")


# -- modules ----------------------------------------------------------------------------------------------------------


class Turned(nn.LayerNorm):
    """Of channels that come first."""

    back: tuple[int, ...]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(self.back)


@pytest.mark.parametrize(("back", "converted", "code"), [((0, 3, 1, 2), 1, ""), ((0, 3, 2, 1), 0, "NF301")])
def test_a_module_that_is_a_norm_between_transposes(back: tuple[int, ...], converted: int, code: str) -> None:
    """The second does not undo the first, though the sizes would allow it."""
    norm = Turned(6)
    norm.back = back
    module = nn.Sequential(nn.Conv2d(3, 6, 1), norm, nn.Conv2d(6, 4, 1)).double().eval()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    result, report = normfuse.optimize(module, EXACT, args=(x,))
    assert report.converted == converted and isinstance(result[1], RMSNorm) == bool(converted)
    assert report.norms[0].conversion is not None and report.norms[0].conversion["code"] == code
    torch.testing.assert_close(result(x), module(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [
    "gpt2", "convnext",
    *(pytest.param(n, marks=pytest.mark.slow) for n in CASES if n not in ("gpt2", "convnext")),
])  # fmt: skip
def test_a_module_stays_an_ordinary_module(name: str) -> None:
    case = CASES[name]
    module, args = case.build(), case.inputs()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    result, report = normfuse.optimize(module, EXACT, args=args)
    assert counts(report) == TIED.get(name, (case.converted, case.norms, case.operators))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert sum(isinstance(m, RMSNorm) for m in result.modules()) == report.converted
    with torch.no_grad():
        want, got = module(*args), result(*args)
        exact = copy.deepcopy(module).double()(*(a.double() if a.is_floating_point() else a for a in args))
    assert relative(exact, got) <= 2 * relative(exact, want) + 1e-7
    assert list(result.state_dict()) == list(module.state_dict())
    saved = io.BytesIO()
    torch.save(result, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    with torch.no_grad():
        assert torch.equal(loaded(*args), got)
    result(*args).square().mean().backward()
    grads = [p.grad for p in result.parameters() if p.requires_grad and p.grad is not None]
    assert grads
    assert all(bool(torch.isfinite(g).all()) for g in grads)


def test_a_tied_table_stays_tied_or_is_copied_on_request() -> None:
    case = CASES["gpt2"]
    module, args = case.build(), case.inputs()
    tied, report = normfuse.optimize(module, EXACT, args=args)
    assert counts(report) == (7, 7, 1)
    inner: Any = tied.model
    before: Any = module.model
    assert inner.transformer.wte.weight is inner.lm_head.weight
    assert torch.equal(inner.lm_head.weight, before.lm_head.weight)
    copied, report = normfuse.optimize(module, Config(layernorm_to_rmsnorm="exact", untie=True), args=args)
    assert counts(report) == (7, 7, 0)
    inner = copied.model
    assert inner.transformer.wte.weight is not inner.lm_head.weight
    with torch.no_grad():
        assert float(inner.transformer.wte.weight.mean(1).abs().max()) < 1e-6
        assert relative(module(*args), copied(*args)) < 1e-5
    result, report = normfuse.optimize(program(case), Config(layernorm_to_rmsnorm="exact", untie=True))
    assert counts(report) == (7, 7, 0)
    with torch.no_grad():
        assert relative(module(*args), result.module()(*args)) < 1e-5


def test_an_exported_program_with_a_copied_table_saves_and_loads(tmp_path: Path) -> None:
    case = CASES["gpt2"]
    result, _ = normfuse.optimize(program(case), Config(layernorm_to_rmsnorm="exact", untie=True))
    torch.export.save(result, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    with torch.no_grad():
        assert torch.equal(loaded.module()(*case.inputs()), result.module()(*case.inputs()))


# -- torch.compile ----------------------------------------------------------------------------------------------------


def test_compiled_where_the_weights_are_constants() -> None:
    case = CASES["gpt_neox"]
    module, args = case.build(), case.inputs()
    options: dict[str, Any] = {"layernorm_to_rmsnorm": "exact", "inner": "eager"}
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(module, backend="normfuse", options=options)
        assert relative(module(*args), compiled(*args)) < 1e-5
    report = normfuse.last_report()
    assert report is not None
    assert report.converted == case.norms
    graph = {k: v.clone() for k, v in module.state_dict().items()}
    assert all(torch.equal(v, graph[k]) for k, v in case.build().state_dict().items())


@pytest.mark.parametrize("grad", [True, False])
def test_compiled_where_the_weights_are_inputs_it_says_what_to_do(grad: bool) -> None:
    case = CASES["phi"]
    torch._dynamo.reset()
    compiled: Any = torch.compile(case.build(), backend="normfuse", options={"layernorm_to_rmsnorm": "exact"})
    with torch.set_grad_enabled(grad), pytest.raises(Exception, match="convert the module first"):
        compiled(*case.inputs())


def test_a_converted_module_compiles() -> None:
    case = CASES["phi"]
    module, _ = normfuse.optimize(case.build(), EXACT, args=case.inputs())
    torch._dynamo.reset()
    compiled: Any = torch.compile(module, backend="normfuse", options={"inner": "aot_eager"})
    torch.testing.assert_close(compiled(*case.inputs()), module(*case.inputs()))


# -- what is left alone, and what else is edited ----------------------------------------------------------------------


def test_a_model_without_layer_norms_keeps_every_byte(tmp_path: Path) -> None:
    from tests.families import cached_export

    source = cached_export("llama", 23, True)
    plain, exact = tmp_path / "plain.onnx", tmp_path / "exact.onnx"
    normfuse.rewrite(source, plain)
    report = normfuse.rewrite(source, exact, EXACT)
    assert report.converted == 0
    assert plain.read_bytes() == exact.read_bytes()


def test_the_weights_of_rms_norms_are_folded_on_request(tmp_path: Path) -> None:
    from tests.families import cached_export

    source = cached_export("llama", 18, True)
    config = Config(fold_scale=True, verify="model", numerics="fast")
    report = normfuse.rewrite(source, tmp_path / "out.onnx", config)
    assert report.model_check is not None
    assert report.model_check["equal"]
    before = normfuse.inspect(source)
    assert [(n.name, n.fact, n.weight, n.form) for n in report.norms] == [
        (n.name, n.fact, n.weight, n.form) for n in before.norms]  # fmt: skip
    gone = "its weight went into the linear layers behind it"
    assert {(n.action, n.reason, n.verified) for n in report.norms} == {("fused", gone, True)}
    assert "conversion" not in report.to_dict()["norms"][0]
    model = onnx.load(tmp_path / "out.onnx")
    calls = [n for n in model.graph.node if n.op_type.startswith("rms_norm")]
    assert len(calls) == 5
    assert all(len(n.input) == 1 for n in calls)  # no weight is left
    program, args = program_of_llama()
    folded, told = normfuse.optimize(program, Config(fold_scale=True))
    assert {(n.action, n.reason) for n in told.norms} == {("fused", gone)}
    with torch.no_grad():
        assert relative(program.module()(*args), folded.module()(*args)) < 1e-5


def test_a_weight_that_was_folded_is_not_folded_again(tmp_path: Path) -> None:
    text = """
    <ir_version: 11, opset_import: ["" : 23]>
    g (float[2, 4] x) => (float[2, 3] y) <float[4] w = {1.5, -2.0, 0.5, 3.0}, float[4, 3] k = {1.0, 2.0, 3.0, 4.0, 5.0,
                                          6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0}> {
      n = RMSNormalization <axis = -1, epsilon = 1e-6> (x, w)
      y = MatMul(n, k)
    }
    """
    source, first, second = tmp_path / "in.onnx", tmp_path / "first.onnx", tmp_path / "second.onnx"
    onnx.save(onnx.parser.parse_model(text), source)
    config = Config(fold_scale=True, verify="model")
    assert normfuse.rewrite(source, first, config).fused == 1
    assert normfuse.rewrite(first, second, config).fused == 0
    assert first.read_bytes() == second.read_bytes()


def program_of_llama() -> tuple[Any, tuple[torch.Tensor, ...]]:
    from tests.families import FAMILIES

    family = FAMILIES["llama"]
    with torch.no_grad():
        return torch.export.export(family.build(), family.args(), strict=False), family.args()


def test_the_command_line_tells_the_certificate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from normfuse.cli import main

    case = CASES["bloom"]
    source = cached("layernorm-bloom", lambda path: to_onnx(case.build(), case.inputs()).save(path))
    args = ["rewrite", str(source), str(tmp_path / "out.onnx"), "--layernorm-to-rmsnorm", "exact", "--overwrite"]
    assert main(args) == 0
    text = capsys.readouterr().out
    assert "LayerNorm to RMSNorm: 8 of 8" in text
    assert "1 centring operator" in text
    assert "certificate: equal to" in text
    assert main([*args, "-v"]) == 0
    text = capsys.readouterr().out
    assert "mean taken away along axis" in text
    assert "because" in text


def test_the_recogniser_of_pp_ocr(tmp_path: Path) -> None:
    """A pretrained model: all five norms with one operator, and over 320 positions no other character."""
    package = importlib.util.find_spec("rapidocr_onnxruntime")
    if package is None or package.origin is None:
        pytest.skip("rapidocr-onnxruntime is not installed")
    source, out = Path(package.origin).parent / "models/ch_PP-OCRv4_rec_infer.onnx", tmp_path / "out.onnx"
    report = normfuse.rewrite(source, out, EXACT)
    assert counts(report) == (5, 5, 1)
    images = np.random.default_rng(0).uniform(-1, 1, (8, 3, 48, 320)).astype(np.float32)
    # ONNX Runtime's optimiser rounds the weights of convolutions anew, of the original too
    before, after, fast = (session(path, optimise=optimise).run(None, {"x": images})[0]
                           for path, optimise in ((source, False), (out, False), (out, True)))  # fmt: skip
    assert before.shape[:2] == (8, 40) and np.abs(before - after).max() <= 2e-6
    assert all((before.argmax(-1) == other.argmax(-1)).all() for other in (after, fast))
