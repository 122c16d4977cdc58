"""Norm operators of mixed types: what torch's exporter writes and no runtime takes is made to run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import normfuse
from normfuse.errors import InputError
from normfuse.sessions import session
from tests.families import FAMILIES, cached, digest, export_onnx
from tests.share import share


@pytest.mark.parametrize(("name", "target"), share(
    ((name, target) for name in ("gemma3", "olmo2", "gpt_oss") for target in ("onnx", "ort-cpu", "normfuse")), 4),
)  # fmt: skip
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


CASTS_LAST = """<ir_version: 8, opset_import: ["": 17]> g (float16[2,8] x) => (float16[2,8] y)
<float[8] w = {1, 2, 3, 4, 5, 6, 7, 8}, float eps = {1e-5}, float two = {2}> {
    d = Mul(wide, wide)
    m = ReduceMean<axes = [-1]>(d)
    s = Add(m, eps)
    r = Sqrt(s)
    q = Div(wide, r)
    n = Mul(q, w)
    z = Mul(n, two)
    y = Cast<to = 10>(z)
    wide = Cast<to = 1>(x)
}"""
"""As ONNX Runtime's converter to float16 leaves a model: its casts stand at the end."""


def test_nodes_out_of_order_are_sorted(tmp_path: Path) -> None:
    """ONNX Runtime runs such a file, and the checker refuses it."""
    source, out, again = tmp_path / "in.onnx", tmp_path / "out.onnx", tmp_path / "again.onnx"
    proto = onnx.parser.parse_model(CASTS_LAST)
    onnx.save(proto, source)
    with pytest.raises(onnx.checker.ValidationError, match="topologically sorted"):
        onnx.checker.check_model(source)
    assert [norm.kind for norm in normfuse.inspect(source).norms] == ["rms_norm"]
    for target in ("onnx", "ort-cpu", "normfuse"):
        config = normfuse.Config(target=target, verify="model")
        report = normfuse.rewrite(source, out, config, overwrite=True)
        assert report.fused == 1 and report.notes[0] == (
            "the nodes were not in topological order, which ONNX demands: sorted")  # fmt: skip
        onnx.checker.check_model(out, full_check=True)
        report = normfuse.rewrite(out, again, config, overwrite=True)
        assert not any("topological" in note for note in report.notes)
        assert again.read_bytes() == out.read_bytes()
    made, _ = normfuse.optimize(proto)
    onnx.checker.check_model(made, full_check=True)


def test_a_model_in_memory_that_is_out_of_order_is_for_its_owner_to_sort() -> None:
    model = ir.from_proto(onnx.parser.parse_model(CASTS_LAST))
    for door in (normfuse.inspect, normfuse.optimize):
        with pytest.raises(InputError, match=r"model\.graph\.sort\(\) puts them into it"):
            door(model)
    model.graph.sort()
    assert len(normfuse.inspect(model).norms) == normfuse.optimize(model)[1].fused == 1


def test_nodes_out_of_order_in_a_sub_graph_and_without_a_norm(tmp_path: Path) -> None:
    """This ONNX Runtime refuses too."""
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
    g (float[2,8] x, bool c) => (float[2,8] y) {
        y = If (c) <then_branch = a () => (float[2,8] t) { t = Neg(s) s = Relu(b) },
                    else_branch = e () => (float[2,8] u) { u = Identity(b) }>
        b = Exp(x)
    }"""), source)  # fmt: skip
    with pytest.raises(InputError, match="topologically sorted"):
        session(source)
    report = normfuse.rewrite(source, out)
    assert not report.norms and len(report.notes) == 1
    onnx.checker.check_model(out, full_check=True)
    x = np.linspace(-1, 1, 16, dtype=np.float32).reshape(2, 8)
    np.testing.assert_allclose(session(out).run(None, {"x": x, "c": np.array(True)})[0], -np.exp(x), rtol=1e-6)
