"""Models that write buffers, inputs or attributes of their own while they run: what is run to check a rewrite leaves
them as they were, through every door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from torch import Tensor, nn

import normfuse
from normfuse.frontends.pt2_run import compare_files
from tests.traced import silent

EXACT = normfuse.Config(layernorm_to_rmsnorm="exact")
MODES: dict[str, dict[str, Any]] = {
    "exact": {"layernorm_to_rmsnorm": "exact"}, "off": {}, "fold_scale": {"fold_scale": True},
    "approximate": {"layernorm_to_rmsnorm": "approximate", "tolerance": 5.0},
}  # fmt: skip


class Streaming(nn.Module):
    """A counter and a cache of what came last; `use`: what of them the output shows."""

    last: Tensor
    calls: Tensor

    def __init__(self, use: str = "last") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.head = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 20)
        nn.init.normal_(self.norm.weight, 1, 0.3)
        nn.init.normal_(self.norm.bias, 0, 0.3)
        self.register_buffer("last", torch.zeros(2, 4, 8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.use, self.step = use, 0

    def forward(self, x: Tensor, cache: Tensor) -> Tensor:
        self.calls.add_(1)
        self.step += 1
        cache.add_(1)
        y: Tensor = self.head(self.norm(self.first(x) + 0)) + cache.sum()
        if self.use == "last":
            y = y + self.last.sum(-1, keepdim=True)
        self.last.copy_(x)
        return torch.where(self.calls > 2, y + 1, y) if self.use == "calls" else y

    def untouched(self) -> bool:
        return not (self.calls.any() or self.last.any())


def given() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(3)


def results(module: Any) -> list[Tensor]:
    """Of three calls one after the other."""
    with torch.no_grad():
        return [module(x * (i + 1), cache) for i in range(3) for x, cache in [given()]]


def close(one: list[Tensor], two: list[Tensor]) -> None:
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use", ["last", "calls", "none"])
@pytest.mark.parametrize("mode", ["exact", "approximate"])
def test_modules(mode: str, use: str) -> None:
    """The module that is given and the one that is given back have not run, nor were the inputs written."""
    module, args = Streaming(use).eval(), given()
    calibration = [given() for _ in range(4)] if mode == "approximate" else None
    made, report = normfuse.optimize(module, normfuse.Config(**MODES[mode]), args=args, calibration=calibration)
    assert report.converted == 1 and not report.refusals
    for one in (module, made):
        assert one.untouched() and one.step == 0
    assert not args[1].any() and not any(cache.any() for _, cache in calibration or ())
    assert {name for name, p in module.named_parameters()} == {name for name, p in made.named_parameters()}
    assert not {p.data_ptr() for p in module.parameters()} & {p.data_ptr() for p in made.parameters()}
    if mode == "exact":
        close(results(module), results(made))


@pytest.mark.parametrize("use", ["last", "calls", "none"])
@pytest.mark.parametrize("mode", MODES)
def test_programs(mode: str, use: str) -> None:
    module, args = Streaming(use).eval(), given()
    program = torch.export.export(module, args)
    calibration = [given() for _ in range(4)] if mode == "approximate" else None
    made, report = normfuse.optimize(program, normfuse.Config(**MODES[mode]), calibration=calibration)
    assert report.converted == (mode in ("exact", "approximate")) and not report.refusals
    assert module.untouched() and not args[1].any() and not any(cache.any() for _, cache in calibration or ())
    example = program.example_inputs
    assert example is not None and not example[0][1].any()
    for one in (program, made):
        assert not one.state_dict["calls"].any() and not one.state_dict["last"].any()


@pytest.mark.parametrize("use", ["last", "calls", "none"])
def test_compiled_and_frozen(use: str) -> None:
    module, want = Streaming(use).eval(), results(Streaming(use).eval())
    torch._dynamo.reset()
    with inductor.patch(freezing=True), silent():
        options: dict[str, Any] = {"layernorm_to_rmsnorm": "exact", "inner": "eager"}
        compiled = torch.compile(module, backend="normfuse", options=options)
        close(want, results(compiled))
    assert int(module.calls) == 3


@pytest.mark.parametrize("mode", ["exact", "off"])
@pytest.mark.parametrize("use", ["last", "none"])
def test_archives(mode: str, use: str, tmp_path: Path) -> None:
    source, out = tmp_path / "in.pt2", tmp_path / "out.pt2"
    torch.export.save(torch.export.export(Streaming(use).eval(), given()), source)
    config = normfuse.Config(verify="model", **MODES[mode])
    report = normfuse.rewrite(source, out, config, trust=True)
    assert report.model_check is not None and report.model_check["equal"]
    assert report.converted == (mode == "exact")
    state = torch.export.load(out).state_dict
    assert not state["calls"].any() and not state["last"].any()
    assert compare_files(source, out, trust=True)["equal"]
