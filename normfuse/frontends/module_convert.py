"""LayerNorm to RMSNorm in an `nn.Module`: traced and planned as a graph, then carried out on a copy of the module.

The copy is an ordinary module: parameters keep their names, LayerNorms are replaced by `normfuse.nn.RMSNorm`, and where
an operator has to stand, the module whose output it follows has a forward hook. It trains, saves and loads.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from normfuse.config import Config
from normfuse.conversion import Conversion
from normfuse.convert import refusals, tell, worst
from normfuse.errors import InputError, UnsupportedError, first_line
from normfuse.frontends.fx_approximate import approximate_program
from normfuse.frontends.fx_certify import with_own_state
from normfuse.frontends.fx_convert import Converted, convert_program
from normfuse.frontends.fx_effects import held, hooked, is_assert
from normfuse.frontends.fx_emit import is_one
from normfuse.graph import Node, Value
from normfuse.nn import Centre, RMSNorm
from normfuse.norm import Expr, Site
from normfuse.report import Report

TOLERANCE = 64
"""How far module and converted graph may differ, in roundings of the output's type."""
OTHERWISE = 1e-4
"""How far they may differ where the graph rounds otherwise than the module that it was traced from: the converted
module is then compared with that. A graph that is further away is another model's, and nothing is proved of this."""


def convert_module(module: nn.Module, config: Config, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None,
                   calibration: Any = None) -> tuple[nn.Module, Report]:  # fmt: skip
    """A copy of a module with its LayerNorms converted where that is proved, and the report.

    `args` and `kwargs` are inputs to trace it with, `calibration` tuples of inputs for the approximate mode. Raises
    `InputError` where it cannot be traced with these, or where a weight to be edited holds NaN or infinity.
    """
    started = time.perf_counter()
    if config.layernorm_to_rmsnorm == "off":
        raise UnsupportedError("an nn.Module is taken for layernorm_to_rmsnorm='exact' only; to fuse its norms, use "
                               "torch.compile(module, backend='normfuse'), or give an exported program")  # fmt: skip
    try:
        out = copy.deepcopy(module)  # which is not run, since that may change it
        traced = with_own_state(module).eval()
    except Exception as why:  # what a module holds raises anything: old weight norms, once called, keep such a tensor
        raise InputError(f"{type(module).__name__} cannot be copied: {first_line(why)}") from why
    program = _trace(traced, *_own(args, kwargs))
    places = _Places(program, out, cache(lambda: _first_tensors(module, args, kwargs)))
    new_program, found = convert_program(program, config, places)
    cost = None
    if config.layernorm_to_rmsnorm == "approximate":
        exact = [r for r in found.records if r.verdict != "kept"]
        new_program, more, cost = approximate_program(new_program, config, calibration, exact,
                                                       places.unfit_approximated)
        found.records = exact + more.records
        found.approximated, found.tensors = more.approximated, found.tensors | more.tensors
    if found.plan is not None or found.approximated:
        try:
            _edit(out, found, places)
            try:
                got, want = (_run(m, args, kwargs) for m in (out, new_program.module()))
            except Exception as why:
                raise _Unfit(f"the converted module does not run: {first_line(why)}") from why
            gap = _gap(want, got)
            allowed = TOLERANCE * max((torch.finfo(v.dtype).eps for v in want), default=0.0)
            if not gap <= allowed and not (gap <= OTHERWISE and _gap(_run(traced, args, kwargs), got) <= allowed):
                raise _Unfit(f"the converted module differs from the converted graph by {gap:.2g}")
            failed = ""
        except _Unfit as why:
            failed = str(why)
        if failed:
            found.records = [refusals(r.site, "NF304", failed) if r.verdict != "kept" else r for r in found.records]
            new_program, out, cost = program, copy.deepcopy(module), None
    report = _report(program, new_program, config, found)
    report.approximation = cost
    if report.converted:
        report.notes.append("proved for calls that take the way through the module that the example inputs take: "
                            "hidden states that are asked for, or embeddings that are given, are others")  # fmt: skip
    if report.converted and any(_drops(m) for m in out.modules()):
        report.notes.append("values that dropout sets to zero give the rows a mean again: the converted module is "
                            "exact in evaluation mode, and in training with a dropout of 0")  # fmt: skip
    if fast := len(_fast_layers(out)):
        report.notes.append(f"in evaluation without gradients torch computes {fast} nn.TransformerEncoderLayer by an "
                            "operator of its own, with LayerNorms, which gives the same; "
                            "torch.backends.mha.set_fastpath_enabled(False) makes it take the RMSNorms")  # fmt: skip
    modes = {name: m.training for name, m in module.named_modules()}
    for name, m in out.named_modules():
        m.training = modes.get(name, module.training)
    report.seconds = {"total": round(time.perf_counter() - started, 4)}
    return out, report


def _gap(want: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> float:
    if len(want) != len(got):
        return math.inf
    return worst([v.double().numpy() for v in want], [v.double().numpy() for v in got])


def _drops(module: nn.Module) -> bool:
    p = getattr(module, "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "dropout", 0.0)
    return isinstance(p, float) and p > 0


class _Unfit(Exception):
    """The plan has no form in the module; the message says why."""


def _trace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        with torch.no_grad():
            return torch.export.export(module, args, kwargs, strict=False)
    except Exception as why:  # the tracer raises anything
        text = (str(why).strip() or type(why).__name__).splitlines()[0]
        raise InputError(f"{type(module).__name__} cannot be traced with these inputs: {text[:300]}") from why


def _own(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs again, which a module may write."""
    return copy.deepcopy((tuple(args), dict(kwargs or {})))


def _run(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> list[torch.Tensor]:
    own, (args, kwargs) = with_own_state(module), _own(args, kwargs)
    for part in own.modules():  # an unlifted program refuses `eval`
        part.training = False
    with torch.no_grad():
        return _outputs(own(*args, **kwargs))


Firsts = tuple[torch.Tensor | None, torch.Tensor | None]


def _first_tensors(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> dict[str, Firsts]:
    """For each module by path what a hook of it sees first of its inputs and of its output, without elements; none for
    a module that runs when it is traced only."""
    own, found = with_own_state(module).eval(), dict[str, Firsts]()

    def watch(path: str) -> Any:
        def hook(_: nn.Module, given: Any, output: Any) -> None:
            first, last = (v[0] if isinstance(v, tuple) and v else v for v in (given, output))
            found[path] = _bare(first), _bare(last)

        return hook

    for path, part in own.named_modules(remove_duplicate=False):
        part.register_forward_hook(watch(path))
    args, kwargs = _own(args, kwargs)
    with torch.no_grad(), contextlib.suppress(Exception):
        own(*args, **kwargs)
    return found


def _bare(value: Any) -> torch.Tensor | None:
    return value.to("meta") if isinstance(value, torch.Tensor) else None


def _outputs(out: Any) -> list[torch.Tensor]:
    from torch.utils._pytree import tree_flatten

    if hasattr(out, "to_tuple"):
        out = out.to_tuple()
    return [v for v in tree_flatten(out)[0] if isinstance(v, torch.Tensor) and v.is_floating_point()]


def _report(before: Any, program: Any, config: Config, found: Converted) -> Report:
    from dataclasses import replace

    from normfuse.frontends.fx_model import report_on

    plain = replace(config, layernorm_to_rmsnorm="off")
    report, sites = report_on(program, plain)
    tell(report, sites, found.records)
    report.recall(report_on(before, plain)[0])
    report.format, report.rewritten = "module", True
    for norm in report.norms:
        if norm.action == "found":
            norm.action = "kept"
        if norm.action == "converted":
            norm.emitted = "normfuse.nn.RMSNorm"
    return report


class _Places:
    """Where the values of a traced graph stand in the module."""

    def __init__(self, program: Any, module: nn.Module, firsts: Callable[[], Mapping[str, Firsts]]) -> None:
        self.module, self.firsts = module, firsts
        self.nodes: dict[str, fx.Node] = {node.name: node for node in program.graph.nodes}
        self.targets = {spec.arg.name: str(spec.target) for spec in program.graph_signature.input_specs if spec.target}
        self.known = {path: id(part) for path, part in module.named_modules(remove_duplicate=False)}
        self.calls: dict[int | None, set[str]] = {}  # of a module, which may have several names
        for node in self.nodes.values():
            for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
                self.calls.setdefault(self.known.get(_clean(path)), set()).add(f"{path} {key}")

    def path(self, node: fx.Node) -> str:
        """The innermost module that a node belongs to."""
        stack = self.nodes.get(node.name, node).meta.get("nn_module_stack") or {}
        return _clean(next(reversed(stack.values()))[0]) if stack else ""

    def inside(self, node: fx.Node, path: str) -> bool:
        """Whether a node belongs to a module."""
        stack = self.nodes.get(node.name, node).meta.get("nn_module_stack") or {}
        return any(_clean(p) == path for p, _ in stack.values())

    def hook_of(self, node: fx.Node) -> tuple[str, bool] | None:
        """(module, whether it is what goes in): the module, called once, that a node is the output of, or else into
        which alone it goes; None for a value inside of one."""
        node = self.nodes.get(node.name, node)
        if node.op == "placeholder" or not node.users:
            return None
        path = self.path(node)
        if self._once(path) and not any(self.inside(user, path) for user in node.users):
            return path, False
        stacks = [[_clean(p) for p, _ in (u.meta.get("nn_module_stack") or {}).values()] for u in node.users]
        shared = [p for p in stacks[0] if all(p in stack for stack in stacks) and not self.inside(node, p)]
        return (shared[0], True) if shared and self._once(shared[0]) else None

    def _once(self, path: str) -> bool:
        return bool(path) and len(self.calls.get(self.known.get(path), ())) == 1

    def can_place(self, value: Value) -> bool:
        """Whether a hook can put an operator behind a value: a hook centres the first of what it is given."""
        hook = self.hook_of(value.native) if isinstance(value.native, fx.Node) else None
        if hook is None:
            return False
        first = self.firsts().get(hook[0], (None, None))[0 if hook[1] else 1]
        return first is not None and value.shape == tuple(first.shape) and f"torch.{value.dtype}" == str(first.dtype)

    def shared(self, value: Value) -> str | None:
        """Who else has a parameter, unseen in the graph."""
        name = self.targets.get(value.native.name)
        return None if name is None else self.elsewhere(name)

    def elsewhere(self, name: str) -> str | None:
        """Of the modules that share a parameter one that the trace has not seen, which may be called another time."""
        found = held(self.module, name)
        names = [other for other, parameter in self.module.named_parameters(remove_duplicate=False)
                 if parameter is found]  # fmt: skip
        for other in names if len(names) > 1 else ():
            owner = other.rpartition(".")[0]
            if owner and self.known.get(owner) not in self.calls:
                same = next(n for n in names if n != other)
                return f"{other}, which these inputs do not reach, is the same parameter as {same}"
        return None

    def owners(self, value: Value, readers: Iterable[fx.Node]) -> dict[str, str] | None:
        """The modules that readers of a parameter belong to, by path, with the name that it has in each; None where one
        of them does not have it, or by several names."""
        out, old = dict[str, str](), held(self.module, self.targets[value.native.name])
        for path in dict.fromkeys(map(self.path, readers)):
            own = self.module.get_submodule(path).named_parameters(recurse=False, remove_duplicate=False)
            names = [name for name, parameter in own if parameter is old]
            if len(names) != 1:
                return None
            out[path] = names[0]
        return out

    def can_copy(self, value: Value, readers: Sequence[Node]) -> bool:
        """Whether some readers of a parameter can be given a copy of it: an attribute changes for all that read it. So
        each of the others has to belong to a module that has the parameter too, and has none of theirs in it."""
        old, asked = held(self.module, self.targets[value.native.name]), {reader.native.name for reader in readers}
        same = [self.nodes[name] for name, path in self.targets.items() if held(self.module, path) is old]
        mine = self.owners(value, [reader.native for reader in readers])
        others = self.owners(value, [user for node in same for user in node.users if user.name not in asked])
        if mine is None or others is None:
            return False
        changed = {self.known[path] for path in mine}
        names = [f".{name}." for name, module in self.known.items() if module in changed]
        return not any(name.startswith(f".{path}.".replace("..", ".")) for path in others for name in names)

    def norm_module(self, site: Site, inner: Site) -> tuple[str, int] | None:
        """The module that is a norm and nothing else, and its axis from the end."""
        for s in (inner, site):
            ends = ((s.norm.x, y, s.norm.axes[0]) for y in _ends(s))
            for x, y, axis in (*ends, *_turned(s)):
                path = self.path(y.native) if isinstance(y.native, fx.Node) else ""
                outside = isinstance(x.native, fx.Node) and not self.inside(x.native, path)
                if path and outside and not self._read_in(y, path):
                    return path, axis - (x.rank or 0)
        return None

    def _read_in(self, value: Value, path: str) -> bool:
        """Whether a module reads a value, other than to give it out as it is."""
        for user in self.nodes.get(value.native.name, value.native).users:
            if self.inside(user, path) and not is_assert(user):
                copies = [n.outputs[0] for n in value.uses if n.native is not None and n.native.name == user.name and
                          n.kind in ("cast", "identity") and n.outputs[0].dtype == value.dtype]  # fmt: skip
                if not copies or self._read_in(copies[0], path):
                    return True
        return False

    def unfit(self, site: Site, inner: Site) -> str | None:
        """Why a norm cannot be replaced in the module."""
        found = self.norm_module(site, inner)
        if found is None:
            native = inner.value.native
            path = self.path(native) if isinstance(native, fx.Node) else ""
            kind = type(self.module.get_submodule(path)).__name__
            return f"it is no module of its own, but a part of the forward function of {path or 'the model'}, a {kind}"
        path = found[0]
        if hooked(self.module.get_submodule(path)):
            return f"its module {path} has hooks, or another forward function than its class"
        norm = inner.norm
        expected = {n for n in ("weight", "bias") if getattr(self.module.get_submodule(path), n, None) is not None}
        own = {n for n, _ in self.module.get_submodule(path).named_parameters()}
        if own != expected or {n for n, e in (("weight", norm.weight), ("bias", norm.bias)) if e} != expected:
            return f"its module {path} has other parameters than a weight and a bias"
        plain = _offset(norm.weight) is not None and _offset(norm.bias) == 0.0
        return None if plain else f"its module {path} computes its weight"

    def unfit_approximated(self, site: Site, inner: Site) -> str | None:
        """The same where its bias is edited."""
        bias = inner.norm.bias
        native = bias[0][1][0][0].native if bias is not None and is_one(bias) else None
        name = self.targets.get(native.name) if isinstance(native, fx.Node) else None
        return self.unfit(site, inner) or (None if name is None else self.elsewhere(name))

    def partial(self, norms: Mapping[Site, Site]) -> dict[Site, str]:
        """Of the norms that are to be converted (and what their operators are), those of a module that is called for
        others as well, or in several ways, and why it stays."""
        called: dict[int | None, dict[Site, Hashable]] = {}
        paths: dict[int | None, str] = {}
        for site, inner in norms.items():
            found = self.norm_module(site, inner)
            assert found is not None  # `unfit` has seen to it
            key = self.known.get(found[0])
            paths[key] = found[0]
            called.setdefault(key, {})[site] = (found[1], inner.norm.size, inner.norm.eps, _offset(inner.norm.weight))
        out: dict[Site, str] = {}
        for key, ways in called.items():
            times = len(self.calls[key])
            if len(ways) != times or len(set(ways.values())) > 1:
                why = f"its module {paths[key]} is called {times} times, and not all of them are converted"
                out |= dict.fromkeys(ways, why)
        return out


def _offset(expr: Expr | None) -> float | None:
    """The number that is added to the parameter of a module that a weight or bias is, in its own type and before casts;
    None where it is something else."""
    if expr is None:
        return 0.0
    if not is_one(expr):
        return None
    node = (value := _uncast(expr[0][1][0][0])).producer
    if node is None:
        return 0.0
    parts = sorted(node.inputs, key=lambda v: v.number is None) if node.kind == "add" else []
    if len(parts) != 2 or parts[0].number is None or parts[1].producer is not None or parts[1].dtype != value.dtype:
        return None
    return parts[0].number


def _uncast(value: Value) -> Value:
    while value.producer is not None and value.producer.kind in ("cast", "identity"):
        value = value.producer.inputs[0]
    return value


def _clean(path: str) -> str:
    """The path of a module as `get_submodule` takes it."""
    return path.removeprefix("L['self']").lstrip(".").split("@")[0]


def _edit(module: nn.Module, found: Converted, places: _Places) -> None:
    plan, targets = found.plan or Conversion(), places.targets
    copied = {v.native.name: (places.owners(v, [n.native for n in nodes]), _get(module, targets[v.native.name]))
              for v, nodes in plan.copies.items()}  # fmt: skip
    with torch.no_grad():
        factors = [_factor(node, plan, targets) for node in plan.scaled]
        for factor in factors:
            if why := places.elsewhere(factor):
                raise _Unfit(why)
        for name, tensor in found.tensors.items():
            source = found.copies.get(name)
            if source is None:
                if why := places.elsewhere(targets[name]):
                    raise _Unfit(why)
                _get(module, targets[name]).copy_(tensor)
                continue
            owners, old = copied[source]
            assert owners is not None  # `can_copy` has seen to it
            fresh = nn.Parameter(tensor, old.requires_grad)
            for path, attribute in owners.items():
                setattr(module.get_submodule(path), attribute, fresh)
        for factor in factors:
            _get(module, factor).fill_(1.0)
    norms = {site: plan.inner.get(site, site) for site in plan.sites} | found.approximated
    made = set[nn.Module]()
    for site, inner in norms.items():
        known, offset = places.norm_module(site, inner), _offset(inner.norm.weight)
        assert known is not None and offset is not None and isinstance(inner.norm.size, int)  # `unfit` has seen to it
        old_norm = module.get_submodule(known[0])
        if old_norm in made:  # by the first of its calls
            continue
        new = RMSNorm.of(old_norm, inner.norm.size, inner.norm.eps, known[1], offset)
        made.add(new)
        for path in [path for path, part in module.named_modules(remove_duplicate=False) if part is old_norm]:
            above, _, last = path.rpartition(".")
            setattr(module.get_submodule(above), last, new)
    _leave_fast_path(module, {places.norm_module(site, inner) for site, inner in found.approximated.items()})
    for value, want in plan.operators:
        hook = places.hook_of(value.native)
        assert hook is not None  # the plan asked for it
        owner, centre = module.get_submodule(hook[0]), Centre(want.axis - (value.rank or 0))
        if hook[1]:
            owner.register_forward_pre_hook(centre)
        else:
            owner.register_forward_hook(centre)


def _leave_fast_path(module: nn.Module, approximated: Collection[tuple[str, int] | None]) -> None:
    """In evaluation without gradients torch computes an encoder layer by an operator of its own, from the parameters
    of LayerNorms, which approximated ones are not. It does so where the layer says which activation it has."""
    changed = {module.get_submodule(known[0]) for known in approximated if known is not None}
    for layer in _fast_layers(module):
        if not changed.isdisjoint((layer.norm1, layer.norm2)):
            layer.activation_relu_or_gelu = 0
    for encoder in module.modules():
        if isinstance(encoder, nn.TransformerEncoder) and not all(
                getattr(layer, "activation_relu_or_gelu", True) for layer in encoder.layers):
            encoder.use_nested_tensor = False  # which only that operator takes


def _fast_layers(module: nn.Module) -> list[Any]:
    """The encoder layers of torch that may be computed so, and have norms that were replaced."""
    layers: list[Any] = [part for part in module.modules() if isinstance(part, nn.TransformerEncoderLayer)]
    return [layer for layer in layers if layer.activation_relu_or_gelu and
            any(isinstance(norm, RMSNorm) for norm in (layer.norm1, layer.norm2))]  # fmt: skip


def _factor(node: Node, plan: Conversion, targets: Mapping[str, str]) -> str:
    """The path of the constant behind the factor of a multiplication, which nothing else reads."""
    value = plan.factor(node)
    once = len(value.uses) == 1
    while value.producer is not None:
        value = value.producer.inputs[0]
        once = once and len(value.uses) == 1
    if not once:
        raise _Unfit(f"{targets[value.native.name]} is read in several places")
    return targets[value.native.name]


def _get(module: nn.Module, path: str) -> torch.Tensor:
    owner, _, name = path.rpartition(".")
    found = getattr(module.get_submodule(owner), name)
    assert isinstance(found, torch.Tensor)
    return found


def _ends(site: Site) -> Iterator[Value]:
    """The value of a norm, and what it was before it was multiplied by a mask of ones."""
    value: Value | None = site.value
    while value is not None:
        yield value
        node = value.producer
        rest = [v for v in node.inputs if v.number != 1] if node is not None and node.kind == "mul" else []
        value = rest[0] if len(rest) == 1 else None


def _turned(site: Site) -> Iterator[tuple[Value, Value, int]]:
    """x, the norm and its axis outside of transposes, where the one before the norm and the one behind it cancel."""
    before, behind = site.norm.x.producer, site.value.uses
    if before is None or before.kind != "transpose" or [node.kind for node in behind] != ["transpose"]:
        return
    there, back = before.attrs["perm"], behind[0].attrs["perm"]
    if [there[i] for i in back] == sorted(there):
        yield before.inputs[0], behind[0].outputs[0], there[site.norm.axes[0]]
