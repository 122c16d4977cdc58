"""`torch.compile(model, backend="normfuse")`: models of transformers, outputs and gradients, options, caches."""

from __future__ import annotations

import logging
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import normfuse
from normfuse import backend
from normfuse.frontends.fx_fused import FusedEmitter
from normfuse.ops import meaning, register
from tests.families import FAMILIES, FUSED, LAYERS, MORE, OTHERS
from tests.compiling import Stack, check_model, operators, run, small, uncached

pytestmark = pytest.mark.usefixtures("fresh")


DYNAMIC = ("opt", "qwen3", "gemma3", "deepseek_v3")


OFTEN = "deepseek_v3 gemma3 olmo2 bert".split()


@pytest.mark.parametrize(("name", "dynamic"), [
    *(pytest.param(n, None, marks=() if n in OFTEN else pytest.mark.slow) for n in FAMILIES),
    (DYNAMIC[0], True), *(pytest.param(n, True, marks=pytest.mark.slow) for n in DYNAMIC[1:]),
])  # fmt: skip
def test_family(name: str, dynamic: bool | None, graphs: list[torch.fx.GraphModule]) -> None:
    family = FAMILIES[name]
    check_model(name, "aot_eager", dynamic)
    report = normfuse.last_report()
    assert report is not None and len(graphs) == (2 if dynamic else 1)  # Dynamo starts again where floats are inputs
    assert len(report.norms) == family.norms
    assert dict(Counter(n.placement for n in report.norms)) == family.placements
    assert not report.refusals and all(n.action in ("fused", "left") for n in report.norms)
    layer = FUSED.get(name) or OTHERS[report.norms[-1].kind]
    want = Counter({op: n * LAYERS for op, n in layer.items()}) + MORE.get(name, Counter())
    made = operators(graphs[-1])
    assert {op: n for op, n in made.items() if op not in ("rms_norm", "layer_norm")} == want


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_family_with_inductor(name: str) -> None:
    check_model(name, "inductor")


# -- how it is reached -------------------------------------------------------------------------------------------------


def test_it_needs_no_import() -> None:
    program = ("import torch; f = torch.compile(lambda x: x + 1, backend='normfuse', options={'inner': 'eager'}); "
               "print(f(torch.zeros(1)).item())")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "1.0\n"


@pytest.mark.parametrize(("more", "message"), [
    ({"options": 5}, "options=5: give a dict"),
    ({"options": {"numeric": "exact"}}, "has no option 'numeric'; it has inner, mode, layernorm_to_rmsnorm, numerics"),
    ({"options": {"inner": "tvm"}}, "inner='tvm' is not known; choose one of 'inductor', 'aot_eager', 'eager'"),
    ({"options": {"numerics": "loose"}}, "numerics='loose' is not known"),
    ({"options": {"inner": "eager", "mode": "reduce-overhead"}}, "mode='reduce-overhead' is for inner='inductor'"),
    ({"options": {"mode": "fastest"}}, "mode='fastest' is not known; choose one of 'default', 'reduce-overhead'"),
])  # fmt: skip
def test_bad_options(more: dict[str, Any], message: str) -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message.replace("(", r"\(")) as why:
        torch.compile(small, backend="normfuse", **more)(torch.randn(4, 8), torch.ones(8))
    assert isinstance(why.value.inner_exception, normfuse.InputError)


def test_a_bad_weight_is_an_error_of_the_model_and_not_ours() -> None:
    with pytest.raises(Exception, match=r"size of tensor a|broadcast"):
        torch.compile(small, backend="normfuse", options={"inner": "eager"})(torch.randn(4, 8), torch.ones(3))


def test_nothing_to_fuse_reaches_the_inner_backend_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    captured: list[Any] = []

    def inner(graph: torch.fx.GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        given.append(graph)
        return graph.forward

    monkeypatch.setattr(backend, "lookup_backend", lambda name: inner)

    def spy(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        captured.append(graph)
        return backend.backend(graph, inputs, options={"inner": "aot_eager"})

    torch.compile(lambda x: torch.relu(x) + 1, backend=spy)(torch.randn(3))
    assert captured[0] is given[0]


def test_a_norm_whose_fusion_failed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not that it has no neighbour."""
    emit = FusedEmitter.emit

    def wrong(self: FusedEmitter, graph: torch.fx.Graph, edit: Any, *more: Any) -> Any:
        made = emit(self, graph, edit, *more)
        (target,) = (node for node in made[0] if "normfuse" in str(node.target))
        target.args = tuple(a * 2 if isinstance(a, float) else a for a in target.args)
        return made

    def two(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        s = x + x.sin()
        return nn.functional.layer_norm(s, (8,), w), s

    torch.compile(two, backend="normfuse", options={"inner": "eager"})(torch.randn(4, 8), torch.ones(8))
    (norm,) = (normfuse.last_report() or normfuse.Report()).norms
    assert norm.action == "fused"
    monkeypatch.setattr(FusedEmitter, "emit", wrong)
    torch._dynamo.reset()
    torch.compile(two, backend="normfuse", options={"inner": "eager"})(torch.randn(4, 8), torch.ones(8))
    (norm,) = (normfuse.last_report() or normfuse.Report()).norms
    assert norm.action == "left" and norm.reason.startswith("as add_layer_norm it failed: ")


def test_a_neighbour_that_cannot_be_taken_in_is_told() -> None:
    """The stream of a ViT without a token for the class lies in memory as its convolution left it, and is an output."""
    class ViT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.places = nn.Conv2d(3, 16, 8, 8), nn.Parameter(torch.randn(1, 16, 16))
            self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

        def forward(self, x: Tensor) -> list[Tensor]:
            states = [self.patches(x).flatten(2).transpose(1, 2) + self.places]
            for norm, linear in zip(self.norms, self.layers, strict=False):
                states.append(states[-1] + linear(norm(states[-1])))
            return [*states, self.norms[-1](states[-1])]

    with torch.no_grad():
        torch.compile(ViT(), backend="normfuse", options={"inner": "eager"})(torch.randn(2, 3, 32, 32))
    report = normfuse.last_report()
    assert report is not None and [n.action for n in report.norms] == ["left"] * 3
    apart = "it is one operator already, and has a neighbour that stays: its result would lie in memory in another way"
    assert all(n.reason.startswith(apart) for n in report.norms[1:])


def test_attention_that_projects_by_itself_is_no_product_of_queries_and_keys() -> None:
    """The pooling head of SigLIP: what goes into the operator is the norm, and not a query or key."""
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pre, self.last, self.mlp = nn.LayerNorm(16), nn.LayerNorm(16), nn.Linear(16, 16)
            self.probe, self.pool = nn.Parameter(torch.randn(2, 1, 16)), nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            h = x + torch.relu(self.mlp(self.pre(x)))
            y = self.last(h + self.mlp(h))
            return self.pool(self.probe, y, y)[0], y

    with torch.no_grad():
        torch.compile(Pooled(), backend="normfuse", options={"inner": "eager"})(torch.randn(2, 3, 16))
    report = normfuse.last_report()
    assert report is not None and [n.placement for n in report.norms] == ["pre", "final"]


def test_report_and_log_say_what_was_done_and_why_not(caplog: pytest.LogCaptureFixture) -> None:
    def two(x: Tensor, w: Tensor) -> Tensor:
        y, s = small(nn.functional.rms_norm(x, (8,), w, 1e-6), w)
        return y + s

    with caplog.at_level(logging.DEBUG, "normfuse.backend"):
        torch.compile(two, backend="normfuse")(torch.randn(4, 8), torch.ones(8))
    report = normfuse.last_report()
    assert report is not None
    assert [(n.action, n.emitted) for n in report.norms] == [("left", ""), ("fused", "normfuse.add_rms_norm")]
    assert report.norms[0].reason == "it is one operator already, and has no neighbour to take in"
    assert "2 norms (RMSNorm" in caplog.text and "normfuse.add_rms_norm for 1; 1 left" in caplog.text
    assert report.norms[0].reason in caplog.text
    assert "1 of 1 operators are taken apart again" in report.notes[0] and report.notes[0] in caplog.text


# -- caches and the plugin ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [None, {"inner": "aot_eager"}])
def test_a_model_of_several_graphs_has_several_reports(options: dict[str, Any] | None) -> None:
    def broken(x: Tensor, w: Tensor) -> Tensor:
        y = nn.functional.rms_norm(x + 1, (16,), w, 1e-6)
        torch._dynamo.graph_break()
        return nn.functional.layer_norm(y, (16,), w)

    with torch.no_grad():
        torch.compile(broken, backend="normfuse", options=options)(torch.randn(4, 16), torch.rand(16))
        torch.compile(torch.sum, backend="normfuse", options=options)(torch.randn(4))
    assert [[n.kind for n in report.norms] for report in normfuse.reports()] == [["rms_norm"], ["layer_norm"], []]
    assert normfuse.last_report() is normfuse.reports()[-1]
    torch.compiler.reset()
    assert normfuse.reports() == [] and normfuse.last_report() is None


def test_the_version_names_every_source_file() -> None:
    assert backend.version().startswith(f"normfuse-{normfuse.__version__}-")
    assert normfuse.InductorPass().uuid() != normfuse.InductorPass(normfuse.Config(numerics="fast")).uuid()


def test_another_version_misses_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    own = uuid.uuid4().hex
    x, w = torch.randn(4, 8), torch.rand(8)
    hits = []
    for tag in (f"{own}-a", f"{own}-a", f"{own}-b"):
        torch._dynamo.reset()
        counters.clear()
        monkeypatch.setattr(backend, "version", lambda tag=tag: tag)
        torch.compile(small, backend="normfuse")(x, w)
        hits.append(counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"] > 0)
    assert hits == [False, True, False]


@pytest.mark.parametrize("name", ["pre_grad_custom_pass", "post_grad_custom_pre_pass"])
def test_inductor_plugin(name: str) -> None:
    model, x = Stack(), torch.randn(4, 16)
    parameters = dict(model.named_parameters())
    want = run(model, (x,), parameters)
    before = normfuse.last_report()
    with uncached():  # what was compiled before, in another run too, no pass sees again
        got = run(torch.compile(model, options={name: normfuse.InductorPass()}), (x,), parameters)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    report = normfuse.last_report()
    if name == "post_grad_custom_pre_pass":
        assert report is before  # nothing would take the operators apart again on a CPU
    else:
        assert report is not None and report is not before and report.fused == 3


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # Inductor's advice on how a GPU is used
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "olmo2", "gpt2"])
def test_on_a_gpu(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients in bfloat16, by the kernels no further from float64 than eager or the same graph is by the
    definitions: what Inductor compiles around an operator rounds otherwise than eager does. The second run replays."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    monkeypatch.setattr(register, "SMALL", 0)
    family = FAMILIES[name]
    args, model = tuple(a.cuda() for a in family.args()), family.build().cuda().bfloat16()
    parameters = dict(model.named_parameters())
    own = [run(model, args, parameters)]
    for where in (meaning, register._kernels()):
        monkeypatch.setattr(register, "_kernels", lambda where=where: where)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="normfuse", options={"mode": mode})
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            got = [t.clone() for t in run(compiled, args, parameters)]
        own.append(got)
    wide = family.build().cuda().bfloat16().double()
    exact = run(wide, args, dict(wide.named_parameters()))
    zero = 1e-3 * max(float(c.abs().max()) for c in exact[1:])
    for label, eager, defined, found, c in zip(["output", *parameters], *own, exact, strict=True):
        allowed = 2 * max(float((t - c).abs().max()) for t in (eager, defined))
        assert float((found - c).abs().max()) <= allowed + zero, label


@pytest.mark.gpu
def test_operators_in_a_cuda_graph() -> None:
    """Captured and replayed on other values."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    x, r, w = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((64, 4096), (64, 4096), (4096,)))
    call = torch.ops.normfuse.add_rms_norm
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        call(x, r, w, None, 1e-6)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, s = call(x, r, w, None, 1e-6)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip((y, s), call(x, r, w, None, 1e-6), strict=True):
        assert torch.equal(got, want)
