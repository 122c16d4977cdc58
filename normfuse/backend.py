"""``torch.compile(model, backend="normfuse")``: fuse the norms of each graph that Dynamo captures, then compile it.

The graph is rewritten before AOTAutograd, so that the fused operators bring their fused backward. Options are those of
`normfuse.Config`, `inner`: the backend that compiles the result, "inductor" (default), "aot_eager" or "eager", and
`mode`, which goes to Inductor (torch.compile takes `mode` or `options`, not both). What was done is logged by
"normfuse.backend" (``TORCH_LOGS=normfuse.backend``, a line a norm at ``+normfuse.backend``) and kept for `reports`.

An operator of ours is a barrier to Inductor's fusions. So a norm is replaced where the operator takes in a neighbour or
where its backward pays: on a GPU, when training. Any other norm is left to Inductor; on a GPU, without training, those
of query and key too, which it fuses with the rotation that reads them. On the CPU the operators are taken apart again
in AOTAutograd, and Inductor fuses the pieces.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.registry import lookup_backend
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

import normfuse
from normfuse.config import Config, config_of, demand_torch, demand_use
from normfuse.errors import InputError, UnsupportedError
from normfuse.frontends import fx_model
from normfuse.frontends.fx_meta import meta_of
from normfuse.norm import Site
from normfuse.ops.register import decompose_on_cpu, stays
from normfuse.plan import ALONE
from normfuse.report import Report

log = logging.getLogger("normfuse.backend")
INNER = ("inductor", "aot_eager", "eager")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
FILES = ("ort_version", "first", "norms", "tolerance")
"""The options of a `Config` that are for ONNX files and calibration."""
_reports: deque[Report] = deque(maxlen=1000)


def reports() -> list[Report]:
    """What the backend did to each graph that it compiled, in their order, since `torch.compiler.reset()` or the start.

    A model is one graph, or several: where Dynamo breaks it, for each length that it compiles anew, and of a language
    model that generates one for the prompt and one for a token. The last 1,000 are kept. Of an `InductorPass` too, but
    for code that Inductor had in its cache: then it is not called.
    """
    return list(_reports)


def last_report() -> Report | None:
    """What the backend did to the graph that it compiled last, the last of `reports`; None before the first."""
    return _reports[-1] if _reports else None


def backend(graph: fx.GraphModule, inputs: Sequence[Any], *, mode: str | None = None,
            options: dict[str, Any] | None = None) -> Callable[..., Any]:  # fmt: skip
    """The entry point for Dynamo. Raises `InputError` for an option that is not known."""
    if options is not None and not isinstance(options, Mapping):
        raise InputError(f"options={options!r}: give a dict, such as {{'inner': 'inductor'}}")
    inner, mode, config = _options(options or {}, mode)
    training = torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in inputs)
    graph = rewrite(graph, config, inner, training)
    if inner == "eager":
        return graph.forward
    if inner == "aot_eager":
        compiled: Callable[..., Any] = lookup_backend("aot_eager")(graph, list(inputs))
        return compiled
    return _inductor(graph, inputs, mode)


backend.reset = _reports.clear  # type: ignore[attr-defined]  # what Dynamo calls when it forgets its graphs


def rewrite(graph: fx.GraphModule, config: Config, inner: str = "inductor", training: bool = False,
            before_autograd: bool = True) -> fx.GraphModule:  # fmt: skip
    """The module with the norms of its graph fused, in place: what Dynamo has noted on it stays."""

    def leave(site: Site, pair: bool) -> str | None:
        native = site.value.native or site.norm.x.native  # a norm may be computed inside another operator
        found = meta_of(native) if isinstance(native, fx.Node) else None
        cuda = getattr(found, "device", torch.device("cpu")).type == "cuda"
        if (cuda and training) or (pair and not (cuda and inner == "inductor")):
            return None
        if site.is_op:
            return f"it is one operator already, and has {ALONE}"
        return f"{ALONE}: Inductor fuses it as well" if inner == "inductor" else None

    if config.converts:
        _demand_constants(graph, config)
    changed, report = fx_model.run(graph, config, rewrite=True, leave=leave, eager=inner == "eager")
    if inner == "inductor" and before_autograd:
        report.notes += _taken_apart(changed.graph)
    _reports.append(report)
    _tell(report)
    if report.fused or report.converted:
        for node in changed.graph.nodes:
            if node.op == "get_attr" and hasattr(graph, str(node.target)):  # a weight that was edited
                setattr(graph, str(node.target), getattr(changed, str(node.target)))
        for name, part in changed.named_children():
            setattr(graph, name, part)
        graph.graph = changed.graph
    return graph


def _taken_apart(graph: fx.Graph) -> list[str]:
    """A note on the operators of which Inductor gets the definitions and not the kernels, if there are any."""
    read = [meta_of(n.args[0]) for n in graph.nodes if getattr(n.target, "namespace", "") == "normfuse"]
    apart = sum(isinstance(x, torch.Tensor) and not stays(x) for x in read)
    return [f"{apart} of {len(read)} operators are taken apart again, and Inductor fuses the pieces, which is faster "
            "on a CPU and for few elements"] if apart else []  # fmt: skip


def _demand_constants(graph: fx.GraphModule, config: Config) -> None:
    """Weights can be edited where they are constants of the graph, in frozen inference; say so where they are not."""
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder" and isinstance(meta_of(n), torch.nn.Parameter)]
    if inputs or torch.is_grad_enabled():
        raise UnsupportedError(
            "converting LayerNorms edits weights, and here these are inputs of the graph: convert the module first "
            "(model, report = normfuse.optimize(model, normfuse.Config(layernorm_to_rmsnorm='exact'), args=inputs)), "
            "or, for frozen inference, set torch._inductor.config.freezing = True and compile under torch.no_grad()"
        )


def _demand_used(config: Config) -> None:
    """Raise for options that are not for graphs that are being compiled."""
    demand_use(config, None)
    demand_torch(config)
    if config.layernorm_to_rmsnorm == "approximate":
        raise UnsupportedError(
            "layernorm_to_rmsnorm='approximate' measures a module on inputs that are given, which a backend has not: "
            "approximate the module first (model, report = normfuse.optimize(model, "
            "normfuse.Config(layernorm_to_rmsnorm='approximate'), args=inputs, calibration=batches)), and compile that"
        )


def _options(options: Mapping[str, Any], mode: str | None) -> tuple[str, str | None, Config]:
    given = {"mode": mode, **options}
    known = ["inner", "mode", *(f.name for f in fields(Config) if f.name not in FILES)]
    for name in given:
        if name not in known:
            raise InputError(f"the backend 'normfuse' has no option {name!r}; it has {', '.join(known)}")
    inner = given.pop("inner", "inductor")
    if inner not in INNER:
        raise InputError(f"inner={inner!r} is not known; choose one of {', '.join(map(repr, INNER))}")
    mode = given.pop("mode")
    if mode is not None and inner != "inductor":
        raise InputError(f"mode={mode!r} is for inner='inductor', not for inner={inner!r}")
    if mode not in (None, *MODES):
        raise InputError(f"mode={mode!r} is not known; choose one of {', '.join(map(repr, MODES))}")
    config = Config(**given)
    _demand_used(config)
    return inner, mode, config


def _inductor(graph: fx.GraphModule, inputs: Sequence[Any], mode: str | None) -> Callable[..., Any]:
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx
    import torch.compiler.config

    decompose_on_cpu()
    patches = list_mode_options(mode) if mode not in (None, "default") else {}
    settings: Any = torch.compiler.config
    # an entry that another version of the operators made is stale
    with settings.patch(cache_key_tag=f"{settings.cache_key_tag}|{version()}"):
        compiled: Any = compile_fx(graph, inputs, config_patches=patches)
    return compiled  # type: ignore[no-any-return]


@cache
def version() -> str:
    """Names this version of NormFuse, down to its source, for caches of compiled code."""
    folder = Path(__file__).parent
    sources = sorted([*folder.rglob("*.py"), *Path(str(folder / "passes")).resolve().glob("*.py")])
    return f"normfuse-{normfuse.__version__}-{get_hash_for_files(tuple(map(str, sources))).hex()[:16]}"


def _tell(report: Report) -> None:
    if not log.isEnabledFor(logging.INFO):
        return
    made = Counter(n.emitted for n in report.norms if n.action == "fused")
    left = sum(n.action != "fused" for n in report.norms)
    log.info("%d norms (%s): %s; %d left", len(report.norms), report.recipe,
             ", ".join(f"{k} for {v}" for k, v in made.items()) or "none fused", left)  # fmt: skip
    for norm in report.norms:
        log.debug("%s: %s (%s) -> %s", norm.name, norm.kind, norm.placement, norm.emitted or norm.reason or norm.action)
    for note in report.notes:
        log.info(note)
    for refusal in report.refusals:
        log.info("%s at %s: %s", refusal.code, refusal.node, refusal.message)


class InductorPass(CustomGraphPass):
    """The same passes for those who keep ``backend="inductor"``: a value for Inductor's `pre_grad_custom_pass`.

    ``torch.compile(model, options={"pre_grad_custom_pass": normfuse.InductorPass()})``. As `post_grad_custom_pre_pass`
    it runs after AOTAutograd: then the backward stays the model's own, and graphs on the CPU are left as they are,
    because nothing takes the operators apart any more.
    """

    def __init__(self, config: Config | None = None) -> None:
        self.config = config_of(config)
        _demand_used(self.config)

    def uuid(self) -> str:
        """Changes with the options and with any line of NormFuse, so that no cached code is stale."""
        return f"{version()}-{self.config}"

    def __call__(self, graph: fx.Graph) -> None:
        """Fuse the norms of a graph in place."""
        decompose_on_cpu()
        module = graph.owning_module
        placeholders = [meta_of(n) for n in graph.nodes if n.op == "placeholder"]
        tensors = [t for t in placeholders if isinstance(t, torch.Tensor)]
        after = any("val" in n.meta and "example_value" not in n.meta for n in graph.nodes)
        if module is None or (after and not any(t.is_cuda for t in tensors)):
            return
        training = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        rewrite(module, self.config, "inductor", training and not after, before_autograd=not after)
        if module.graph is not graph:  # whoever called goes on with the graph that he gave
            inputs = [[n for n in g.nodes if n.op == "placeholder"] for g in (module.graph, graph)]
            for node in reversed([n for n in graph.nodes if n.op != "placeholder"]):
                graph.erase_node(node)
            graph.output(graph.graph_copy(module.graph, dict(zip(*inputs, strict=True))))
            module.graph = graph
