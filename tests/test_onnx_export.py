"""`normfuse.export`: from a module to an optimised file in one call."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import normfuse
import normfuse.ort
from normfuse import onnx_export
from normfuse.errors import InputError, UnsupportedError, VerificationError
from normfuse.io import files
from normfuse.sessions import session
from tests.families import FAMILIES


class Block(nn.Module):
    """Two inputs, one by keyword; a norm that is spelled out, and one behind a sum."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.w, self.inner, self.last = nn.Parameter(torch.rand(width)), nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        """What the tests export."""
        n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.w
        out: Tensor = self.last(x + self.inner(n * scale))
        return out


def dynamic(count: int) -> Any:
    """Batch and sequence of each input as free sizes."""
    return ({0: "batch", 1: "sequence"},) * count


def check(module: nn.Module, args: tuple[Tensor, ...], path: Path, **kwargs: Any) -> onnx.ModelProto:
    """A file is valid and gives what the module gives."""
    made = onnx.load(path)
    onnx.checker.check_model(path, full_check=True)
    runtime = session(path)
    feeds = dict(zip([str(i.name) for i in runtime.get_inputs()], (a.numpy() for a in (*args, *kwargs.values())),
                     strict=True))  # fmt: skip
    want = module(*args, **kwargs).detach().numpy()
    assert np.abs(runtime.run(None, feeds)[0] - want).max() <= 2e-5 * np.abs(want).max()
    return made


@pytest.mark.parametrize(("name", "opset"), [
    ("llama", 18), ("deepseek_v3", 23),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("gemma3", 18), ("gpt2", 18), ("deepseek_v3", 18), ("gpt_oss", 18), ("gemma3", 23), ("llama", 23), ("gpt2", 23),
        ("gpt_oss", 23))),
])  # fmt: skip
def test_family(name: str, opset: int, tmp_path: Path) -> None:
    family, path = FAMILIES[name], tmp_path / "out.onnx"
    module, args = family.build(), family.args()
    model: Any = module.model
    if family.experts:
        model.set_experts_implementation("grouped_mm")  # transformers' default, which torch's exporter does not take
    before = model.config._experts_implementation
    module.train()
    module.eval()
    modes = [m.training for m in module.modules()]
    state = {k: v.clone() for k, v in module.state_dict().items()}
    # at opset 23 torch 2.13 writes a RotaryEmbedding of free sizes that ONNX Runtime 1.31 does not run
    free = dynamic(1) if name in ("llama", "gemma3") and opset == 18 else None
    config = normfuse.Config(verify="model")
    report = normfuse.export(module, args, path, config, opset_version=opset, dynamic_shapes=free)
    assert len(report.norms) == family.norms and not report.refusals and report.opset == opset
    assert report.model_check is None or report.model_check["equal"]
    assert "exported by torch.onnx.export at opset" in report.notes[-1]
    assert model.config._experts_implementation == before and [m.training for m in module.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]
    made = check(module, args, path)
    assert bool(made.graph.input[0].type.tensor_type.shape.dim[0].dim_param) == (free is not None)


def test_keywords_names_and_targets(tmp_path: Path) -> None:
    module, args, scale = Block(), (torch.randn(2, 3, 16),), torch.rand(16)
    module.train()
    path = tmp_path / "out.onnx"
    report = normfuse.export(module, args, path, normfuse.Config(target="normfuse", verify="model"), opset_version=18,
                             kwargs={"scale": scale}, input_names=["x", "scale"], output_names=["y"])  # fmt: skip
    assert {n.emitted for n in report.norms} == {"function normfuse.rms_norm", "function normfuse.bias_add_layer_norm"}
    assert module.training and module.last.training
    made = check(module.eval(), args, path, scale=scale)
    assert [i.name for i in made.graph.input] == ["x", "scale"] and made.graph.output[0].name == "y"


def test_a_program_that_was_made_before(tmp_path: Path) -> None:
    module, args, scale = Block().eval(), (torch.randn(2, 3, 16),), torch.rand(16)
    with torch.no_grad():
        program = torch.onnx.export(module, args, kwargs={"scale": scale}, dynamo=True, verbose=False)
    assert program is not None
    nodes = [n.op_type for n in program.model.graph]
    report = normfuse.export(program, args, tmp_path / "out.onnx")
    assert report.fused == 1 and [n.op_type for n in program.model.graph] == nodes
    check(module, args, tmp_path / "out.onnx", scale=scale)
    made, report = normfuse.optimize(program)
    assert type(made) is type(program) and report.fused == 1
    made.save(tmp_path / "saved.onnx")
    check(module, args, tmp_path / "saved.onnx", scale=scale)
    exported = torch.export.export(module, args, {"scale": scale})
    assert normfuse.export(exported, (), tmp_path / "third.onnx").fused == 1
    with pytest.raises(InputError, match="exported already; 'opset_version' has no effect"):
        normfuse.export(program, args, tmp_path / "other.onnx", opset_version=18)


def test_a_program_with_our_operators(tmp_path: Path) -> None:
    """As `optimize` gives it back, or a .pt2 that was rewritten: the norms are found anew, for the target."""
    module, args, scale = Block().eval(), (torch.randn(2, 3, 16),), torch.rand(16)
    program, first = normfuse.optimize(torch.export.export(module, args, {"scale": scale}))
    assert first.fused == 2 and "normfuse.add_layer_norm" in str(program.graph)
    report = normfuse.export(program, args, tmp_path / "out.onnx", normfuse.Config(target="normfuse"))
    assert report.fused == 2
    check(module, args, tmp_path / "out.onnx", scale=scale)


def test_large_weights_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "INLINE", 1000)
    module, args, scale = Block(64).eval(), (torch.randn(2, 3, 64),), torch.rand(64)
    report = normfuse.export(module, args, tmp_path / "out.onnx", kwargs={"scale": scale})
    data, model = sorted(tmp_path.iterdir())
    assert model.name == "out.onnx" and data.name.startswith("out-") and data.suffix == ".data"
    assert data.stat().st_size >= 64 * 64 * 4 and "MiB of weights" in report.notes[-1]
    check(module, args, model, scale=scale)
    again = tmp_path / "again"
    again.mkdir()
    normfuse.export(module, args, again / "out.onnx", kwargs={"scale": scale})
    assert [(p.name, p.read_bytes()) for p in sorted(again.iterdir())] == [
        (p.name, p.read_bytes()) for p in (data, model)]  # fmt: skip
    (last := tmp_path / "last").mkdir()  # what an optimiser made lies in a folder that is gone by now
    normfuse.export(module, args, last / "out.onnx", normfuse.Config(first="onnxscript", target="normfuse"),
                    kwargs={"scale": scale})  # fmt: skip
    check(module, args, last / "out.onnx", scale=scale)


class Wild(nn.Module):
    """What no exporter takes."""

    def forward(self, x: Tensor) -> Tensor:
        """Branches on the data."""
        return x + 1 if bool(x.sum() > 0) else x - 1


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda p: normfuse.export(Wild(), (torch.ones(2),), p), UnsupportedError, "does not take this Wild"),
    (lambda p: normfuse.export(Block(), [torch.ones(2)], p), InputError, "args is a list"),  # type: ignore[arg-type]
    (lambda p: normfuse.export("model.pt", (), p), InputError, "a str cannot be exported"),
    (lambda p: normfuse.export(Block(), (), p, f="x"), InputError, r"no option 'f'.*argument path"),
    (lambda p: normfuse.export(Block(), (), p, dynamo=False), InputError, "no option 'dynamo'"),
    (lambda p: normfuse.export(Block(), (), p, colour="red"), InputError, "unexpected keyword.*colour"),
    (lambda p: normfuse.export(Block(), (), p / "no" / "folder.onnx"), InputError, "does not exist"),
    (lambda p: normfuse.export(Block(), (), p.parent), InputError, "is a directory"),
])  # fmt: skip
def test_bad_input(call: Callable[[Path], Any], error: type[Exception], text: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=text):
        call(tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_the_module_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["olmoe"]
    module = family.build()
    model: Any = module.model
    model.set_experts_implementation("grouped_mm")

    def fails(*_: Any, **__: Any) -> None:
        assert model.config._experts_implementation == onnx_export.EXPERTS
        raise RuntimeError("on purpose\nand more")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(UnsupportedError, match="RuntimeError: on purpose;"):
        normfuse.export(module, family.args(), tmp_path / "out.onnx")
    assert model.config._experts_implementation == "grouped_mm"


def test_an_output_that_exists(tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    path.write_bytes(b"mine")
    with pytest.raises(InputError, match="exists already"):
        normfuse.export(Block(), (torch.randn(2, 16),), path, kwargs={"scale": torch.rand(16)})
    assert path.read_bytes() == b"mine"
    normfuse.export(Block(), (torch.randn(2, 16),), path, overwrite=True, kwargs={"scale": torch.rand(16)})
    onnx.checker.check_model(path, full_check=True)


def test_a_difference_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"equal": False, "outputs": [{"name": "y", "max_rel": 0.5}], "tolerance": 64.0, "provider": "CPU"}
    monkeypatch.setattr("normfuse.frontends.onnx_wide.compare_rewritten", lambda *_, **__: found)
    with pytest.raises(VerificationError, match="'y' differs"):
        normfuse.export(Block(), (torch.randn(2, 16),), tmp_path / "out.onnx", normfuse.Config(verify="model"),
                        kwargs={"scale": torch.rand(16)})  # fmt: skip
    assert not list(tmp_path.iterdir())


class Tiny(nn.Module):
    """A length without eps, as CLIP has it, and a norm whose eps torch's exporter takes for 0."""

    def __init__(self, eps: float | None) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Both of the same rows."""
        length: Tensor = x / x.norm(dim=-1, keepdim=True)
        return length + x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) if self.eps else length


@pytest.mark.parametrize(("eps", "optimize", "norms", "told"), [
    (1e-8, None, 1, "exported with optimize=False: "), (1e-12, None, 1, "exported with optimize=False: "),
    (1e-8, True, 0, "NF103: "), (1e-8, False, 1, ""), (1e-6, None, 1, ""), (None, None, 0, ""),
])  # fmt: skip
def test_an_eps_that_the_exporter_drops(eps: float | None, optimize: bool | None, norms: int, told: str, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The module is exported again where that keeps the eps, and only there."""
    calls = Mock(wraps=torch.onnx.export)
    monkeypatch.setattr(torch.onnx, "export", calls)
    options: dict[str, Any] = {} if optimize is None else {"optimize": optimize}
    report = normfuse.export(Tiny(eps), (torch.randn(2, 8),), tmp_path / "o.onnx", **options)
    assert len(report.norms) == report.fused == norms
    notes = [note for note in report.notes if "drops additions" in note]
    assert [note.startswith(told) and "the eps of 1 norm" in note for note in notes] == [True] * bool(told)
    assert calls.call_count == 1 + ("exported with" in told)
    if norms and not told:
        check(Tiny(eps), (torch.randn(2, 8),), tmp_path / "o.onnx")


def test_an_eps_that_an_export_made_before_lacks(tmp_path: Path) -> None:
    program = torch.onnx.export(Tiny(1e-8).eval(), (torch.randn(2, 8),), dynamo=True, verbose=False)
    report = normfuse.export(program, None, tmp_path / "o.onnx")
    assert not report.norms and any("NF103: torch.onnx.export's optimizer drops" in note for note in report.notes)


def test_others_print_and_log_while_a_module_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         capfd: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """Two exports wait for each other, and leave streams, loggers and the module's mode as they were."""
    real, inside, most = torch.onnx.export, [0], [0]
    module, own = nn.LayerNorm(8), logging.getLogger("tests.own")
    state = (sys.stdout, sys.stderr, logging.root.manager.disable, logging.getLogger("torch").level, module.training)
    heard: list[logging.LogRecord] = []
    monkeypatch.setattr(own, "handle", heard.append)

    def export(*args: Any, **options: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        print("somebody prints")
        own.warning("somebody logs")
        logging.getLogger("torch.onnx").error("the exporter logs")
        made = real(*args, **options)
        inside[0] -= 1
        return made

    monkeypatch.setattr(torch.onnx, "export", export)
    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(normfuse.export, module, (torch.ones(2, 8),), tmp_path / f"{i}.onnx") for i in range(2)]
        assert [len(one.result().norms) for one in made] == [1, 1]
    out, err = capfd.readouterr()
    assert most == [1] and out.count("somebody prints") == 2 and len(heard) == 2
    assert "the exporter logs" not in err and "[torch.onnx]" not in out
    assert state == (sys.stdout, sys.stderr, logging.root.manager.disable, logging.getLogger("torch").level,
                     module.training)  # fmt: skip


def test_a_module_that_is_not_exported_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Bad(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.nonzero() if x.sum() > 0 else x

    with pytest.raises(UnsupportedError, match="does not take this Bad"):
        normfuse.export(Bad(), (torch.ones(2, 8),), tmp_path / "o.onnx")
    assert capfd.readouterr() == ("", "")
    with onnx_export.silent(), ThreadPoolExecutor(1) as pool:
        print("ours", file=sys.stderr)
        pool.submit(print, "theirs", file=sys.stderr).result()
        sys.stderr.flush()
    assert capfd.readouterr() == ("", "theirs\n")


def test_outputs_and_options_of_export(tmp_path: Path) -> None:
    module, args = nn.LayerNorm(8), (torch.ones(2, 8),)
    with pytest.raises(InputError, match=r"o.pt2: normfuse.export writes ONNX; give an output that ends in .onnx"):
        normfuse.export(module, args, tmp_path / "o.pt2")
    report = normfuse.export(module, args, tmp_path / "o.onnx", opset_version=None)
    assert not any("was asked for" in note for note in report.notes)
    assert [path.name for path in tmp_path.iterdir()] == ["o.onnx"]


class Heads(nn.Module):
    """A LayerNorm of each head, with a weight for each head and an order of roundings that no operator has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.view(x.shape[0], x.shape[1], 4, 16).transpose(1, 2)
        variance = heads.var(-1, keepdim=True, unbiased=False)
        return (heads - heads.mean(-1, keepdim=True)) * torch.rsqrt(variance + 1e-6) * self.weight[:, None, :]


@pytest.mark.parametrize("target", ["onnx", "normfuse"])
def test_a_norm_as_written_of_a_view_of_open_sizes(target: Any, tmp_path: Path) -> None:
    """The function of its nodes also reads what the view is of, for its sizes; what checks it knows them."""
    module, args, path = Heads().half(), (torch.randn(2, 7, 64).half(),), tmp_path / "out.onnx"
    free = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    config = normfuse.Config(target=target, verify="model")
    report = normfuse.export(module, args, path, config, opset_version=18, dynamic_shapes=free)
    (norm,) = report.norms
    assert norm.emitted.endswith("layer_norm_as_written") and norm.verified
    assert report.model_check is not None and report.model_check["equal"]


@pytest.mark.skipif(normfuse.ort.library_path() is None, reason="installed without a C compiler")
def test_a_graph_at_which_that_optimiser_ends_the_process(tmp_path: Path) -> None:
    """Half attention of open sizes and, as NormFuse writes it, no Add behind it."""
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0).half().eval()
    free = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    normfuse.export(layer, (torch.randn(2, 7, 32).half(),), tmp_path / "out.onnx",
                    normfuse.Config(target="normfuse"), opset_version=18, dynamic_shapes=free)  # fmt: skip
    program = ("import sys, onnxruntime, normfuse.ort; options = onnxruntime.SessionOptions(); "
               "normfuse.ort.register(options, sys.argv[1]); onnxruntime.InferenceSession(sys.argv[1], options)")
    assert subprocess.run([sys.executable, "-c", program, tmp_path / "out.onnx"]).returncode == 0
