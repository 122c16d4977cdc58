"""Norm operators of mixed types: what torch's exporter writes and no runtime takes is made to run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import normfuse
from normfuse.errors import InputError
from normfuse.verify import session
from tests.families import FAMILIES, cached, digest, export_onnx


@pytest.mark.parametrize("name", ["gemma3", "olmo2", "gpt_oss"])
@pytest.mark.parametrize("target", ["onnx", "ort-cpu", "normfuse"])
def test_half_exports_at_opset_23(name: str, target: str, tmp_path: Path) -> None:
    family, out = FAMILIES[name], tmp_path / "out.onnx"
    module, args = family.build().half(), family.args()
    source = cached(f"{name}-half-23-{digest(family)}.onnx", lambda path: export_onnx(module, args, path, 23))
    with pytest.raises(InputError, match="does not load"):
        session(source)
    report = normfuse.rewrite(source, out, normfuse.Config(target=target))  # type: ignore[arg-type]
    assert f"{family.norms} norm operators of mixed types" in report.notes[0]
    assert len(report.norms) == family.norms and not report.refusals
    onnx.checker.check_model(out, full_check=True)
    again = normfuse.rewrite(out, tmp_path / "again.onnx", normfuse.Config(target=target))  # type: ignore[arg-type]
    assert (tmp_path / "again.onnx").read_bytes() == out.read_bytes() and not again.fused
    runtime = session(out)
    feeds = dict(zip([i.name for i in runtime.get_inputs()], (a.numpy() for a in args), strict=True))
    half = module(*args).detach().numpy()
    true = module.double()(*args).detach().numpy()
    assert np.abs(runtime.run(None, feeds)[0] - true).max() <= 2 * np.abs(half - true).max()


@pytest.mark.parametrize(("op", "x", "w", "repaired"), [
    ("RMSNormalization", "float16", "float", ["Cast", "RMSNormalization"]),
    ("RMSNormalization", "bfloat16", "float", ["Cast", "RMSNormalization"]),
    ("LayerNormalization", "float16", "float", ["Cast", "LayerNormalization"]),
    ("RMSNormalization", "float", "float16", ["RMSNormalization", "Cast", "Mul"]),
    ("RMSNormalization<axis = 0>", "float", "bfloat16", ["RMSNormalization", "Cast", "Mul"]),
    ("LayerNormalization", "float", "float16", ["LayerNormalization", "Cast", "Mul"]),
    ("RMSNormalization", "float16", "float16", []),
    ("RMSNormalization", "float", "float", []),
    ("RMSNormalization", "double", "float", []),
    ("RMSNormalization", "double", "float16", []),
    ("RMSNormalization", "float16", "bfloat16", []),
])  # fmt: skip
def test_only_where_a_cast_is_lacking(op: str, x: str, w: str, repaired: list[str], tmp_path: Path) -> None:
    size = "2,8" if "axis" in op else "8"
    made = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["": 23]> g ({x}[2,8] x, {w}[{size}] w) => '
                                   f"({w}[2,8] y) {{ y = {op}(x, w) }}")  # fmt: skip
    found, report = normfuse.optimize(made)
    assert [n.op_type for n in found.graph.node] == (repaired or [op])
    assert bool(report.notes) == bool(repaired)
    assert [o.name for o in found.graph.output] == ["y"]
    onnx.save(made, tmp_path / "in.onnx")
    normfuse.rewrite(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert [n.op_type for n in onnx.load(tmp_path / "out.onnx").graph.node] == [n.op_type for n in found.graph.node]
    assert normfuse.inspect(tmp_path / "in.onnx").nodes_before == 1  # looking changes nothing
