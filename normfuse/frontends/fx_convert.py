"""LayerNorm to RMSNorm in a torch graph: plan on it, edit a copy and its constants, certify, and only then go on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import fx
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from normfuse.centring import Centre, Links
from normfuse.config import Config
from normfuse.conversion import Conversion, Means, operator_of, parts_of, rms
from normfuse.convert import Certificate, Edits, Overflow, Record, changes, with_copies
from normfuse.errors import InputError
from normfuse.folding import Folder, fold, folds_note
from normfuse.frontends import fx_channels as table
from normfuse.frontends.fx_certify import certify
from normfuse.frontends.fx_effects import held
from normfuse.frontends.fx_emit import Emitter
from normfuse.frontends.fx_graph import infer
from normfuse.frontends.fx_meta import dtype_of
from normfuse.frontends.fx_model import _Module, _program, _state
from normfuse.graph import Node, Value
from normfuse.norm import Site
from normfuse.ort_values import Array
from normfuse.passes.fold_affine import Contraction
from normfuse.passes.layernorm_to_rmsnorm import convert
from normfuse.passes.remove_dead import RemoveDead
from normfuse.plan import Replace


Unfit = Callable[[Site, Site], "str | None"]
"""Why a norm, as it was found and as its operator has it, cannot be replaced where the conversion is carried out."""


class Host(Protocol):
    """Where a conversion is carried out, if not in the graph that it is planned on: a module."""

    def can_place(self, value: Value) -> bool:
        """Whether an operator can stand behind a value."""

    def can_copy(self, value: Value, readers: Sequence[Node]) -> bool:
        """Whether some readers of a constant can be given a copy of it."""

    def shared(self, value: Value) -> str | None:
        """Who else has a constant, unseen in the graph."""

    def unfit(self, site: Site, inner: Site) -> str | None:
        """`Unfit`."""

    def partial(self, norms: Mapping[Site, Site]) -> Mapping[Site, str]:
        """Of norms to be converted, and what their operators are, those that cannot be without others, and why."""


@dataclass(slots=True)
class Converted:
    """A converted graph: the module, the constants that changed or are new by name, and the records."""

    module: fx.GraphModule
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)  # new constant -> the one it is a centred copy of
    records: list[Record] = field(default_factory=list)
    plan: Conversion | None = None
    notes: list[str] = field(default_factory=list)
    approximated: dict[Site, Site] = field(default_factory=dict)


class Weights:
    """The constants of a graph by the node that stands for them."""

    def __init__(self, module: fx.GraphModule, tensors: Mapping[str, torch.Tensor]) -> None:
        self.module, self.given = module, tensors

    def get(self, native: Any) -> torch.Tensor | None:
        """The tensor of a placeholder (by name), of an attribute, or None."""
        if isinstance(native, str):
            return _attribute(self.module, native)
        if not isinstance(native, fx.Node):
            return None
        return _attribute(self.module, str(native.target)) if native.op == "get_attr" else self.given.get(native.name)

    def plain(self, native: Any) -> torch.Tensor | None:
        """The same, if it holds its elements itself: quantized weights have others behind them."""
        tensor = self.get(native)
        return tensor if type(tensor) in (torch.Tensor, torch.nn.Parameter) else None


def _attribute(module: Any, path: str) -> torch.Tensor | None:
    found = held(module, path)
    return found if isinstance(found, torch.Tensor) else None


def key_of(native: Any) -> str:
    """The name of a constant: a placeholder's, or the path of an attribute."""
    return native if isinstance(native, str) else str(native.target) if native.op == "get_attr" else native.name


class Numbers:
    """What the planner asks of the constants of a torch graph."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.known: dict[Value, bool] = {}

    def array(self, value: Value) -> Array | None:
        """The elements of a constant in float64."""
        tensor = self.weights.get(value.native)
        return None if tensor is None else tensor.detach().to("cpu", torch.float64).numpy()

    def uniform(self, value: Value) -> bool:
        if value not in self.known:
            tensor = self.weights.plain(value.native) if value.leaf and value.fixed else None
            self.known[value] = tensor is not None and tensor.numel() > 0 and bool((tensor == tensor.view(-1)[0]).all())
        return self.known[value]

    def full(self, value: Value, number: int) -> bool:
        """Whether a constant is this number all over."""
        tensor = self.weights.plain(value.native)
        return tensor is not None and bool((tensor == number).all())

    def locked(self, value: Value) -> str | None:
        tensor = self.weights.get(value.native)
        if tensor is None:
            return f"the elements of {value.name} are not known: it is an input of the graph"
        if self.weights.plain(value.native) is None or not tensor.is_floating_point():
            return f"{value.name} is a {type(tensor).__name__} of {tensor.dtype}, which cannot be edited"
        return None

    def twins(self, value: Value) -> Any:
        tensor = self.weights.plain(value.native)
        known = tensor is not None and tensor.layout == torch.strided and not tensor.is_meta and tensor.numel()
        return tensor.untyped_storage().data_ptr() if known and tensor is not None else value


def convert_graph(source: fx.GraphModule, config: Config, state: Mapping[str, torch.Tensor | None] | None,
                  weights: Weights, inputs: Callable[[], list[Any]], level: str | None = None,
                  host: Host | None = None) -> Converted:  # fmt: skip
    """Convert the LayerNorms of a graph module for which it is proved; the module given is not changed.

    `weights` are its constants, `inputs` gives tensors for the other placeholders. Raises `InputError` where a weight
    to be edited holds NaN or infinity.
    """
    plain = replace(config, layernorm_to_rmsnorm="off", target="onnx")
    whole = _Module(source, plain, True, state, level)
    whole.plan.clear()
    whole.plan.refused.clear()
    low, norms = whole.low, [s for s in whole.plan.found.sites if s.norm.kind == "layer_norm"]
    records = [Record.kept(s, "NF301", "it stands in a sub-graph of the model") for part in whole.parts()[1:]
               for s in part.plan.found.sites if s.norm.kind == "layer_norm"]  # fmt: skip
    why = table.hazard(whole.graph, source)
    if why is not None:
        return Converted(source, records=records + [Record.kept(s, "NF305", why) for s in norms])
    numbers, emitter = Numbers(weights), Emitter(whole.emitter.level, "fast")

    def fits(site: Site, inner: Site) -> tuple[str, str] | None:
        found = emitter.expressible(low, rms(inner.norm), inner.value)
        why = found[1] if found is not None else host.unfit(site, inner) if host is not None else None
        return None if why is None else ("NF301", why)

    def apart(site: Site) -> list[Site]:
        if site.norm.kind != "layer_norm" or fits(site, operator_of(site)) is None:
            return [site]
        parts = [s for part in parts_of(whole.plan.found, site) for s in apart(part)]
        return parts if any(fits(s, operator_of(s)) is None for s in parts) else [site]

    if host is not None:  # a norm that is no module may be made of some that are
        whole.plan.found.sites = [s for site in whole.plan.found.sites for s in apart(site)]

    def channels(node: Node, out: Value, want: Centre) -> Links | None:
        return table.channels(low, node, out, want)

    def linear(node: Node, value: Value, axis: int) -> Contraction | None:
        found = table.linear(low, node, value, axis, channels)
        return found if found is not None and weights.plain(found.weight.native) is not None else None

    plan = Conversion() if config.layernorm_to_rmsnorm == "off" else convert(low.graph, whole.plan.found, Means(
        channels=channels,
        span=lambda node, out, axis: table.span(low, node, out, axis),
        hooks=host is not None, uniform=numbers.uniform, locked=numbers.locked, fits=fits, twins=numbers.twins,
        shared=host.shared if host is not None else lambda value: None, untie=config.untie,
        copied=host.can_copy if host is not None else lambda value, readers: True,
        place=lambda value: table.floating(value) and (host is None or host.can_place(value)),
        partial=host.partial if host is not None else lambda norms: {},
        blind=lambda node, value, want: table.blind(low, node, value, want)))  # fmt: skip
    records += [Record.kept(s, r.code, r.message) for s, r in plan.kept.items()]
    if host is None:  # a module keeps its norms' parameters
        folder = Folder(low.graph, plan, linear, channels, numbers.twins, numbers.full)
        folder.run(whole.plan.found.sites, config.fold_scale)
    if not plan.sites and not plan.folds:
        return Converted(source, records=records)
    editor = Editor(whole, plan, numbers)
    module = source
    try:
        module = editor.run()
        check = certify(source, module, editor, weights, inputs, config)
    except Overflow as why:
        check = Certificate(False, message=str(why))
    if check is not None and not check.ok:
        failed = [Record.kept(s, "NF304", check.message) for s in plan.changed()]
        return Converted(source, records=records + failed)
    records += changes(plan, check, editor.results)
    return Converted(module, editor.tensors, editor.edits.copies, records, plan, folds_note(plan))


class Editor:
    """Carries a conversion out on the copy of a graph that it was planned on."""

    def __init__(self, whole: _Module, plan: Conversion, numbers: Numbers) -> None:
        self.whole, self.plan, self.numbers = whole, plan, numbers
        self.graph = whole.graph
        self.edits = Edits()
        self.natives: dict[str, Any] = {}
        self.copies: dict[Value, Value] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self.results: dict[Site, tuple[str, str]] = {}

    def run(self) -> fx.GraphModule:
        """Make all edits; the new module."""
        plan, whole = self.plan, self.whole
        for value, want in plan.edits.items():
            name = self._copy(value, plan.copies[value]) if value in plan.copies else self.name(value)
            self.edits.centre(name, want, [self.name(g) for g in want.scales], self.name(value))
        fold(plan, self.edits, self.name)
        self._store()
        centred = {key: self._operator(*key) for key in plan.operators}
        readers = {by: centred[key] for key, found in plan.operators.items() for by in found if isinstance(by, Site)}
        for key, found in plan.operators.items():
            for by in found:
                if not isinstance(by, Site):
                    by[0].native.replace_input_with(key[0].native, centred[key])
        for node in plan.scaled:
            self._bypass(node)
        edits = {}
        for site in plan.changed():
            inner = plan.folded.get(site) or plan.inner.get(site, site)
            x = plan.unscaled(inner.norm.x)
            if site in readers:
                x = Value(x.name, x.shape, x.dtype, native=readers[site], index=x.index)
            edits[site] = Replace(replace(inner, norm=rms(with_copies(plan, inner, self.copies), x), is_op=False))
        whole.plan.replace.extend(edits.values())
        whole.emitter = Emitter(whole.emitter.level, "fast")
        RemoveDead()(whole.plan)
        module = whole.apply()
        for site, edit in edits.items():
            self.results[site] = whole._now(edit.site.value.native).name, whole.emitted[edit.site]
        return module

    def name(self, value: Value) -> str:
        """The name of a constant."""
        name = key_of(value.native)
        self.natives[name] = value.native
        return name

    def _copy(self, value: Value, readers: list[Node]) -> str:
        """A constant again, for some of its readers."""
        native: fx.Node = value.native
        with self.graph.inserting_after(native):
            fresh = self.graph.create_node(native.op, f"{native.target}_centred", (), {}, f"{native.name}_centred")
        fresh.meta, fresh.type = dict(native.meta), native.type
        for reader in readers:
            reader.native.replace_input_with(native, fresh)
        self.natives[key_of(fresh)] = native
        self.copies[value] = Value(fresh.name, value.shape, value.dtype, native=fresh, index=value.index, fixed=True)
        return key_of(fresh)

    def _store(self) -> None:
        """Compute the edited constants in float64, and round them once."""
        def give(name: str) -> Array:
            tensor = self.numbers.weights.get(self.natives[name])
            assert tensor is not None
            return tensor.detach().to("cpu", torch.float64).numpy()

        for name in self.edits.made:
            new, old = torch.from_numpy(self.edits.get(name, give).copy()), self.numbers.weights.get(self.natives[name])
            assert old is not None
            if not torch.isfinite(new).all():
                raise InputError(f"{name}: holds NaN or infinity; a weight with those has no mean to take away")
            rounded = new.to(old.dtype)
            if not torch.isfinite(rounded).all():
                raise Overflow(f"{name} would hold {new.abs().max().item():.3g}, more than its type does")
            self.tensors[name] = rounded.to(old.device)

    def _operator(self, value: Value, want: Centre) -> fx.Node:
        """x - mean(x) behind a value, in float32 for half types."""
        native: fx.Node = value.native
        level, half = self.whole.emitter.level, value.dtype in ("float16", "bfloat16")
        axis, nodes = want.axis - (value.rank or 0), list[fx.Node]()
        to, sub = torch.ops.aten.to.dtype, torch.ops.aten.sub.Tensor

        def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            nodes.append(self.graph.call_function(target, args, kwargs))
            return nodes[-1]

        def cast(x: fx.Node, dtype: torch.dtype) -> fx.Node:
            return call(torch.ops.aten._to_copy.default, x, dtype=dtype) if level == "core" else call(to, x, dtype)

        with self.graph.inserting_after(_last_placeholder(native)):
            x = cast(native, torch.float32) if half else native
            mean = call(torch.ops.aten.mean.dim, x, [axis], True)
            out = call(sub, x, mean)
            if half:
                out = cast(out, getattr(torch, str(value.dtype)))
        for node in nodes:
            node.meta = {k: v for k, v in native.meta.items() if k in ("nn_module_stack", "stack_trace")}
            infer(node, native)
        out.meta = native.meta | out.meta
        return out

    def _bypass(self, node: Node) -> None:
        """Take a multiplication out whose factor is in the constants now."""
        a, b = node.inputs
        node.outputs[0].native.replace_all_uses_with((b if self.plan.factor(node) is a else a).native)


def _last_placeholder(node: fx.Node) -> fx.Node:
    """Where what follows a node may stand: behind the inputs."""
    if node.op != "placeholder":
        return node
    inputs: list[fx.Node] = [n for n in node.graph.nodes if n.op == "placeholder"]
    return inputs[-1]


# -- exported programs ------------------------------------------------------------------------------------------------


def convert_program(program: Any, config: Config, host: Host | None = None) -> tuple[Any, Converted]:
    """Convert an exported program: a new program with edited weights, and what was done."""
    tensors = tensors_of(program)
    empty = next((name for name, tensor in tensors.items() if tensor.is_meta), None)
    if empty is not None:
        raise InputError(f"{empty} is on the meta device and holds no numbers; give the model with its weights")
    level = {"ATEN": "core", "TRAINING": "aten"}.get(program.dialect)
    source = program.graph_module
    found = convert_graph(source, config, _state(program), Weights(source, tensors), lambda: user_inputs(program),
                          level, host)  # fmt: skip
    return rebuilt(program, found), found


def rebuilt(program: Any, found: Converted) -> Any:
    """An exported program with the graph and the constants of a conversion."""
    if found.module is program.graph_module:
        return program
    signature = copy.deepcopy(program.graph_signature)
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    state, constants = dict(program.state_dict), dict(program.constants)
    for name, tensor in found.tensors.items():
        spec = specs[found.copies.get(name, name)]
        target = str(spec.target) if name in specs else f"{spec.target}_centred"
        home = state if spec.target in state else constants
        home[target] = _like(tensor, home.get(str(spec.target)))
        if name not in specs:
            at = signature.input_specs.index(spec)
            signature.input_specs.insert(at + 1, InputSpec(spec.kind, TensorArgument(name), target, spec.persistent))
    return _program(program, found.module, graph_signature=signature, state_dict=state, constants=constants)


def convert_module(module: fx.GraphModule, config: Config) -> tuple[fx.GraphModule, Converted]:
    """Convert a graph module whose weights are its attributes; a weight that is an input of the graph stays."""
    found = convert_graph(module, config, None, Weights(module, {}), lambda: inputs_of(module.graph))
    for path, tensor in found.tensors.items():
        parent, _, name = path.rpartition(".")
        if path in found.copies or not isinstance(_attribute(module, path), torch.Tensor):
            owner: torch.nn.Module = found.module
            for part in parent.split(".") if parent else ():
                owner = getattr(owner, part)
        elif module.get_submodule(parent) is found.module.get_submodule(parent):  # a module that the graph calls
            owner = copy.deepcopy(found.module.get_submodule(parent))
            above, _, last = parent.rpartition(".")
            setattr(found.module.get_submodule(above), last, owner)
        else:
            owner = found.module.get_submodule(parent)
        old = _attribute(module, found.copies.get(path, path))
        setattr(owner, name, _like(tensor, old))
    return found.module, found


def _like(tensor: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor:
    """A tensor, as a parameter where the one before was one."""
    return torch.nn.Parameter(tensor, old.requires_grad) if isinstance(old, torch.nn.Parameter) else tensor


def tensors_of(program: Any) -> dict[str, torch.Tensor]:
    """The constants of an exported program by placeholder."""
    out: dict[str, torch.Tensor] = {}
    for spec in program.graph_signature.input_specs:
        home = program.state_dict if spec.target in program.state_dict else program.constants
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR) and spec.target in home:
            out[spec.arg.name] = home[spec.target]
    return out


def user_inputs(program: Any) -> list[Any]:
    """The example inputs of an exported program, flat; raises `InputError` where it was saved without."""
    from torch.utils._pytree import tree_flatten

    if program.example_inputs is None:
        raise InputError("the exported program has no example inputs, with which the certificate is made")
    args, kwargs = program.example_inputs
    return copy.copy(tree_flatten((args, kwargs))[0])


def inputs_of(graph: fx.Graph) -> list[Any]:
    """Random inputs by the meta of the placeholders: floats normal with mean 0.5, integers 0 or 1."""
    from normfuse.frontends.fx_meta import is_tensor, meta_of, size_of

    generator, symbols = torch.Generator().manual_seed(0), dict[str, int]()
    out: list[Any] = []
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        meta = meta_of(node)
        if not is_tensor(meta):
            out.append(int(meta) if isinstance(meta, int) else size_of(meta, symbols))
            continue
        shape, dtype = [size_of(d, symbols) for d in meta.shape], getattr(torch, dtype_of(meta))
        if dtype.is_floating_point:
            out.append((torch.randn(shape, generator=generator) + 0.5).to(dtype))
        elif dtype == torch.bool:
            out.append(torch.ones(shape, dtype=dtype))
        else:
            out.append(torch.randint(0, 2, shape, generator=generator).to(dtype))
    return out
