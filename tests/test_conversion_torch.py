"""LayerNorm to RMSNorm in programs and modules of torch, where an edit would be seen in a place easily overlooked."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import normfuse
from tests.cli_tools import run
from tests.converted import D, proved, verdicts

# -- torch ------------------------------------------------------------------------------------------------------------


class Chosen(nn.Module):
    """A norm of one of two things."""

    def __init__(self, other: Callable[[Chosen, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.single, self.norm = nn.Linear(4, D), nn.Linear(4, D), nn.Linear(4, 1), nn.LayerNorm(D)
        self.w, self.square, self.other = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D, D)), other
        for p in self.parameters():
            nn.init.normal_(p, 0.5)

    def forward(self, x: Tensor, z: Tensor, flag: Tensor) -> Tensor:
        """The norm."""
        found: Tensor = self.norm(torch.where(flag, self.one(x), self.other(self, x, z)))
        return found


@pytest.mark.parametrize(("other", "converted"), [
    (lambda m, x, z: torch.roll(m.two(x), 1), 0), (lambda m, x, z: torch.roll(m.two(x), 1, 0), 1),
    (lambda m, x, z: torch.roll(m.two(x), 1, -1), 0), (lambda m, x, z: m.single(x) * torch.ones(D), 0),
    (lambda m, x, z: F.linear(z, m.w), 0), (lambda m, x, z: m.square @ m.square, 0),
])  # fmt: skip
@pytest.mark.parametrize("verify", ["off", "sites"])
def test_torch(other: Callable[[Chosen, Tensor, Tensor], Tensor], converted: int, verify: Any) -> None:
    torch.manual_seed(0)
    module, x, z = Chosen(other).eval(), torch.randn(2, D, 4), torch.randn(2, D, D, D)
    masks = [torch.full((2, D, 1), v) for v in (True, False)]
    program = torch.export.export(module, (x, z, masks[0]))
    result, report = normfuse.optimize(program, normfuse.Config(layernorm_to_rmsnorm="exact", verify=verify))
    assert sum((n.conversion or {})["verdict"] != "kept" for n in report.norms) == converted
    for mask in masks:
        torch.testing.assert_close(result.module()(x, z, mask), module(x, z, mask), rtol=1e-4, atol=1e-4)


def test_what_is_detached_is_centred_ahead_of_that() -> None:
    """No operator stands behind it, and still no gradient goes through it."""
    torch.manual_seed(0)
    module, given = Chosen(lambda m, x, z: m.two(x).detach()).eval(), (torch.randn(2, D, 4), torch.zeros(1))
    flag = torch.rand(2, D, 1) > 0.5
    program = torch.export.export(module, (*given, flag))
    result, report = normfuse.optimize(program, normfuse.Config(layernorm_to_rmsnorm="exact"))
    assert [(n.conversion or {})["verdict"] for n in report.norms] == ["exact"]
    converted = result.module()
    found = converted(*given, flag)
    torch.testing.assert_close(found, module(*given, flag), rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    assert converted.one.weight.grad is not None and converted.two.weight.grad is None


class Scaled(nn.Module):
    """A factor for each channel, seen as one of an image (timm's LayerScale2d)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Conv1d(4, D, 1), nn.Conv1d(4, D, 1), nn.LayerNorm(D)
        self.gamma = nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor) -> Tensor:
        """The norm."""
        found: Tensor = self.norm((self.one(x) + self.two(x) * self.gamma.view(1, -1, 1)).transpose(1, 2))
        return found


class Halved(nn.Module):
    """A norm in float32 of a half model (CLIP), and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, D), nn.Linear(D, 3)
        self.w, self.b = nn.Parameter(torch.rand(D)), nn.Parameter(torch.rand(D))
        self.half()

    def forward(self, x: Tensor) -> Tensor:
        """The second layer."""
        x = self.one(x)
        found: Tensor = self.two(F.layer_norm(x.float(), (D,), self.w.float(), self.b.float()).to(x.dtype))
        return found


class Offset(nn.Module):
    """Gemma's norm, of 1 + w, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.w = nn.Linear(4, D), nn.Linear(D, 3), nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor) -> Tensor:
        """The second layer."""
        x = self.one(x)
        found: Tensor = self.two(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.w))
        return found


@pytest.mark.parametrize(("made", "x", "converted"), [
    (Scaled, torch.randn(2, 4, 3), 1), (Halved, torch.randn(2, 4).half(), 1), (Offset, torch.randn(2, 4), 0),
])  # fmt: skip
@pytest.mark.parametrize("as_module", [False, True])
def test_parameters_behind_views_and_casts(made: type[nn.Module], x: Tensor, converted: int, as_module: bool) -> None:
    torch.manual_seed(0)
    module = made().eval()
    config = normfuse.Config(layernorm_to_rmsnorm="exact", fold_scale=not as_module)
    given: Any = module if as_module else torch.export.export(module, (x,))
    want = module(x)
    if as_module:
        result, report = normfuse.optimize(given, config, args=(x,))
    else:
        result, report = normfuse.optimize(given, config)
    done = sum((n.conversion or {}).get("verdict", "kept") != "kept" for n in report.norms)
    assert done == (converted if not as_module or made is Scaled else 0)  # a module's norms are modules of their own
    found = (result if as_module else result.module())(x)
    torch.testing.assert_close(found, want, rtol=1e-2 if x.dtype == torch.half else 1e-4, atol=1e-3)


# -- whole programs and modules ---------------------------------------------------------------------------------------


class Scaling(nn.Module):
    """A norm that reads a multiplication."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.c, self.n = nn.Linear(4, D), nn.Parameter(torch.randn(D)), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        """The norm."""
        found: Tensor = self.n(self.l(x) * self.c)
        return found


@pytest.mark.parametrize("verify", ["off", "sites"])
def test_a_scaled_norm_in_torch(verify: Any) -> None:
    torch.manual_seed(0)
    module, x = Scaling().eval(), torch.randn(2, 4)
    config = normfuse.Config(layernorm_to_rmsnorm="exact", verify=verify)
    program = torch.export.export(module, (x,))
    for result, report in (normfuse.optimize(program, config), proved(module, x, verify=verify)):
        assert verdicts(report) == ["exact"]
        run = result.module() if isinstance(result, torch.export.ExportedProgram) else result
        torch.testing.assert_close(run(x), module(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["exact", "approximate"])
def test_nothing_is_warned_of(mode: Any, tmp_path: Path) -> None:
    """torch warns where the tree specs of a program are copied; a user may have made errors of warnings."""
    torch.manual_seed(0)
    module, x = Scaling().eval(), (torch.randn(2, 4),)
    config, given = normfuse.Config(mode), None
    if mode == "approximate":
        config, given = normfuse.Config(mode, tolerance=0.9), [x, x]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)  # torch 2.10, which loads it
        program = torch.export.export(module, x)
        torch.export.save(program, tmp_path / "in.pt2")
        for model, args in ((module, x), (program, ())):
            assert normfuse.optimize(model, config, args=args, calibration=given)[1].converted == 1
        out = tmp_path / "out.pt2"
        assert normfuse.rewrite(tmp_path / "in.pt2", out, config, trust=True, calibration=given).converted == 1
        exact = normfuse.Config("exact", verify="model")
        assert normfuse.export(module, x, tmp_path / "out.onnx", exact).converted == 1
        assert run("verify", tmp_path / "in.pt2", out, "--trust", "--json")[0] in (0, 1)


class Rotated(nn.Module):
    """A stream whose angles are computed in a sub-graph, as rotary embeddings are: without gradients, in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.n, self.o = nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D)
        self.speeds: Tensor
        self.register_buffer("speeds", torch.rand(D))

    def forward(self, x: Tensor) -> Tensor:
        """The norm, turned."""
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            angles = self.speeds.float() * torch.arange(x.shape[0]).to(torch.float32)[:, None]
            turn = angles.cos().to(x.dtype)
        found: Tensor = self.o(self.n(self.l(x)) * turn)
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_sub_graph_that_asserts_its_types(gradients: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module, x = Rotated().eval().to(dtype), torch.randn(3, D, dtype=dtype)
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(module, (x,))
    result, report = normfuse.optimize(program, normfuse.Config(layernorm_to_rmsnorm="exact"))
    assert [n.action for n in report.norms] == ["converted"], report.refusals
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(result.module()(x), module(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", ["off", "exact"])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_a_decomposed_norm_that_is_an_output(kind: type[nn.Module], mode: Any) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(D, D), kind(D)).eval(), torch.randn(2, D)
    program = torch.export.export(module, (x,)).run_decompositions()
    result, report = normfuse.optimize(program, normfuse.Config(layernorm_to_rmsnorm=mode))
    assert len(report.norms) == 1
    torch.testing.assert_close(result.module()(x), module(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("whole", [
    lambda h: (h * 3).to(torch.int64), lambda h: (h * 3).sum(1, dtype=torch.int64, keepdim=True),
    lambda h: (h * 3).cumsum(1, dtype=torch.int64),
])  # fmt: skip
def test_whole_numbers_are_rounded(whole: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    module, given = Chosen(lambda m, x, z: whole(m.two(x))).eval(), (torch.randn(2, D, 4), torch.zeros(1))
    flag = torch.zeros(2, D, 1, dtype=torch.bool)
    result, report = proved(module, *given, flag, verify="off")
    assert "exact" not in verdicts(report)
    with torch.no_grad():
        torch.testing.assert_close(result(*given, flag), module(*given, flag), rtol=1e-4, atol=1e-4)


class Tied(nn.Module):
    """An embedding and a head with one weight, and dropout."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.e, self.n, self.d = nn.Embedding(9, D), nn.LayerNorm(D), nn.Dropout(p)
        self.head = nn.Linear(D, 9, bias=False)

    def forward(self, ids: Tensor, logits: bool = False) -> Tensor:
        """The hidden states, or what the head makes of them."""
        h: Tensor = self.n(self.d(self.e(ids)))
        return self.head(h) if logits else h


@pytest.mark.parametrize("tied", [True, False])
def test_a_parameter_of_a_module_that_the_inputs_do_not_reach(tied: bool) -> None:
    module, ids = Tied(0.0).eval(), torch.arange(9)[None]
    if tied:
        module.head.weight = module.e.weight
    result, report = proved(module, ids)
    assert verdicts(report) == ["kept" if tied else "exact"]
    torch.testing.assert_close(result(ids, True), module(ids, True), rtol=1e-4, atol=1e-4)


class Beside(Tied):
    """And a norm that does not depend on the weight that two share."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.l, self.m = nn.Linear(D, D), nn.LayerNorm(D)
        self.head.weight = self.e.weight

    def forward(self, ids: Tensor, logits: bool = False) -> Tensor:
        h: Tensor = self.m(self.l(self.n(self.e(ids))))
        return self.head(h) if logits else h


@pytest.mark.parametrize("untie", [False, True])
def test_such_a_parameter_keeps_no_other_norm(untie: bool) -> None:
    torch.manual_seed(0)
    module, ids = Beside().eval(), torch.arange(9)[None]
    result, report = proved(module, ids, untie=untie)
    assert verdicts(report) == ["exact" if untie else "kept", "exact"]
    said = [(r.code, "head.weight, which these inputs do not reach" in r.message) for r in report.refusals]
    assert said == ([] if untie else [("NF303", True)])
    assert torch.equal(result.head.weight, module.head.weight)
    assert (result.e.weight is result.head.weight) is not untie
    for logits in (False, True):
        torch.testing.assert_close(result(ids, logits), module(ids, logits), rtol=1e-4, atol=1e-4)


class Scale(nn.Module):
    """A factor of channels, which a part that is not reached has too."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.n, self.other = nn.Linear(D, D), nn.LayerNorm(D), nn.Module()
        self.factor = nn.Parameter(torch.rand(D) + 1)
        self.other.factor = self.factor
        self.other.forward = lambda x: x * self.factor

    def forward(self, x: Tensor, more: bool = False) -> Tensor:
        h: Tensor = self.n(self.l(x) * self.factor)
        return self.other(h) if more else h


def test_a_factor_of_a_part_that_the_inputs_do_not_reach_stays() -> None:
    torch.manual_seed(0)
    module, x = Scale().eval(), torch.randn(2, D)
    result, report = proved(module, x)
    assert verdicts(report) == ["kept"] and torch.equal(result.factor, module.factor)
    torch.testing.assert_close(result(x, True), module(x, True))


class ScaleBeside(Scale):
    """And a norm that does not depend on the factor."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.m = nn.Linear(D, D), nn.LayerNorm(D)

    def forward(self, x: Tensor, more: bool = False) -> Tensor:
        y: Tensor = self.m(self.k(super().forward(x, more)))
        return y


def test_such_a_factor_keeps_no_other_norm() -> None:
    torch.manual_seed(0)
    module, x = ScaleBeside().eval(), torch.randn(2, D)
    result, report = proved(module, x)
    assert verdicts(report) == ["kept", "exact"] and torch.equal(result.factor, module.factor)
    torch.testing.assert_close(result(x, True), module(x, True), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_dropout_is_told_of(p: float) -> None:
    _, report = proved(Tied(p), torch.arange(9)[None])
    assert verdicts(report) == ["exact"] and any("dropout" in note for note in report.notes) is (p > 0)


class Borrowed(nn.Module):
    """A bias that another layer has as well, and modules under two names."""

    def __init__(self, conv: bool) -> None:
        super().__init__()
        self.c: nn.Module = nn.Conv1d(4, D, 1) if conv else nn.Linear(4, D)
        self.o, self.n, self.conv = nn.Linear(4, D), nn.LayerNorm(D), conv
        self.again = self.n
        for p in self.parameters():
            nn.init.normal_(p, 0.5)
        self.o.bias = self.c.bias  # type: ignore[assignment]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The norm, and the other layer."""
        h = self.c(x.transpose(1, 2)).transpose(1, 2) if self.conv else self.c(x)
        return self.again(h), self.o(x)


@pytest.mark.parametrize("conv", [True, False])
def test_a_bias_that_is_untied_and_a_norm_of_two_names(conv: bool) -> None:
    torch.manual_seed(0)
    module, x = Borrowed(conv).eval(), torch.randn(2, 3, 4)
    result, report = proved(module, x, untie=True)
    assert verdicts(report) == ["exact"] and result.n is result.again
    torch.testing.assert_close(result(x), module(x), rtol=1e-4, atol=1e-4)
    assert list(result.state_dict()) == list(module.state_dict())


class TwoNames(nn.Module):
    """A layer that is called under both of its names."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.a, self.n = nn.Linear(4, D), nn.Linear(D, D), nn.LayerNorm(D)
        self.act, self.b = nn.ReLU(), self.a
        self.last = self.act

    def forward(self, x: Tensor) -> Tensor:
        """The norm of what the second call gives."""
        found: Tensor = self.n(self.last(self.b(self.act(self.a(self.i(x))))))
        return found


def test_a_module_that_is_called_under_two_names() -> None:
    """No hook can stand behind one of the calls."""
    module, x = TwoNames().eval(), torch.randn(2, 4)
    result, report = proved(module, x, force=True)
    assert verdicts(report) == ["kept"] and "NF304" not in str(report.to_dict())
    torch.testing.assert_close(result(x), module(x))


def test_why_a_module_is_not_traced_or_approximated(capfd: pytest.CaptureFixture[str]) -> None:
    """In one line: torch logs a traceback of its own, and a backend is given no inputs to measure on."""
    module = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16)).eval()
    with pytest.raises(normfuse.InputError, match="Sequential cannot be traced with these inputs"):
        normfuse.optimize(module, normfuse.Config("exact"), args=(torch.randn(2, 9),))
    assert capfd.readouterr() == ("", "")
    config = transformers.GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    with pytest.raises(normfuse.InputError, match="use_cache=False"):
        normfuse.optimize(transformers.GPT2LMHeadModel(config).eval(), normfuse.Config("exact"),
                          args=(torch.ones(1, 4, dtype=torch.long),))  # fmt: skip
    options: dict[str, Any] = {"layernorm_to_rmsnorm": "approximate"}
    with pytest.raises(Exception, match="approximate the module first"), torch.no_grad():
        torch.compile(module, backend="normfuse", options=options)(torch.randn(2, 8))
