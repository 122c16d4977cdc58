"""Exported programs: saved and loaded, decomposed, as modules, with asserts and submodules."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, fx

import normfuse
from tests.families import FAMILIES, exported_program
from tests.traced import SINGLE, ULP, NearMissModule, Rewritten, names, rms, silent


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_exported_program_is_saved_loaded_and_left_alone(name: str) -> None:
    family = FAMILIES[name]
    module = family.build()
    source = exported_program(module, family.args(), dynamic=True)
    program, report = normfuse.optimize(source)
    assert type(program) is torch.export.ExportedProgram and report.format == "exported"
    assert program.graph_signature == source.graph_signature
    assert report.nodes_after <= report.nodes_before
    buffer = io.BytesIO()
    with silent():
        torch.export.save(program, buffer)
        buffer.seek(0)
        back = torch.export.load(buffer).module()
    args = family.args(batch=3, seq=9)
    with torch.no_grad():
        want = module(*args)
        assert (back(*args) - want).abs().max() <= 64 * ULP[SINGLE] * want.abs().max()


def test_decomposed_program_gets_the_core_operator() -> None:
    family = FAMILIES["llama"]
    module, args = family.build(), family.args()
    with silent():
        program = exported_program(module, args).run_decompositions()
    new, report = normfuse.optimize(program)
    assert report.fused == family.norms
    made = names(new.graph)
    assert made["_fused_rms_norm"] == 1 and made["normfuse::add_rms_norm"] == family.norms - 1
    with torch.no_grad():
        want = module(*args)
        assert (new.module()(*args) - want).abs().max() <= 64 * ULP[SINGLE] * want.abs().max()


def test_the_module_of_a_program() -> None:
    """Its call of a guard function reads the inputs and leaves them as they are."""
    program = torch.export.export(NearMissModule(lambda x, w: rms(x) * w), (torch.randn(2, 64),))
    new, report = normfuse.optimize(program.module())
    x = torch.randn(2, 64)
    assert report.fused == 1 and isinstance(new, fx.GraphModule)
    assert (new(x) - program.module()(x)).abs().max() < 1e-5


def test_asserts_on_dead_values_go_and_others_stay() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        h = x.to(torch.float32)
        y = h * torch.rsqrt(h.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)
        return w * y.to(x.dtype)

    found = Rewritten(NearMissModule(fn), (torch.randn(2, 64),), "export")
    assert names(found.before[0].graph)["_assert_tensor_metadata"] == 3
    assert found.norms[0].action == "fused"
    left = [n.args[0].name for n in found.after[0].graph.nodes if "_assert_tensor_metadata" in str(n.target)]
    assert left == ["x"]


def test_submodules_are_rewritten_too() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w
        return y + x

    module, x = NearMissModule(fn), torch.randn(2, 64)
    with silent():
        program = torch.export.export(module, (x,))
        new, report = normfuse.optimize(program)
    assert report.fused == 1
    assert (new.module()(x) - module(x)).abs().max() < 1e-5
    assert (program.module()(x) == module(x)).all()


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_program_can_be_unflattened(name: str) -> None:
    """What is left of a norm's module beside the operator, casts and sums, is not a second call of it."""
    family = FAMILIES[name]
    module, args = family.build().float(), family.args()
    source = exported_program(module, args)
    program, _ = normfuse.optimize(source)
    with silent(), torch.no_grad():
        before, after = (torch.export.unflatten(p) for p in (source, program))
        torch.testing.assert_close(after(*args), before(*args), rtol=1e-4, atol=1e-5)
    assert [n for n, _ in after.named_modules()] == [n for n, _ in before.named_modules()]
