"""Where the values of a traced graph stand in the module that it was traced from."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import fx, nn

from normfuse.frontends.fx_effects import held, hooked, is_assert
from normfuse.frontends.module_trial import Trial
from normfuse.graph import PRECISION, Node, Value
from normfuse.norm import Expr, Site, plain


class NormModule(NamedTuple):
    """A module that is a norm: its path, its axis from the end, and the weight and bias that it has."""

    path: str
    axis: int
    weight: Expr | None
    bias: Expr | None


class Places:
    """Where the values of a traced graph stand in the module."""

    def __init__(self, program: Any, module: nn.Module, trial: Trial) -> None:
        self.module, self.trial, self.missed = module, trial, set[str]()
        self.nodes: dict[str, fx.Node] = {node.name: node for node in program.graph.nodes}
        self.targets = {spec.arg.name: str(spec.target) for spec in program.graph_signature.input_specs if spec.target}
        self.written = set(map(str, program.graph_signature.buffers_to_mutate.values()))
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
        if hook is None or value.native.name in self.missed:
            return False
        first = self.trial.firsts.get(hook[0], (None, None))[0 if hook[1] else 1]
        return first is not None and first == (value.shape, f"torch.{value.dtype}")

    def misses(self, values: Iterable[Value]) -> bool:
        """Whether a hook does not see one of these values first, though what it sees is of the same kind: no operator
        can be placed there then."""
        tried = [(value, self.hook_of(value.native)) for value in values]
        missed = {v.native.name for v, hook in tried if hook is None or not self.trial.same(v, *hook)}
        self.missed |= missed
        return bool(missed)

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

    def norm_module(self, site: Site, inner: Site) -> NormModule | None:
        """The module that is a norm and nothing else."""
        for s in (inner, site):
            own = s.norm.weight, s.norm.bias
            ends = ((s.norm.x, y, s.norm.axes[0], *own) for y in _ends(s))
            turned = ((*found, *own) for found in _turned(s))
            for x, y, axis, weight, bias in (*ends, *turned, *_by_heads(s)):
                path = self.path(y.native) if isinstance(y.native, fx.Node) else ""
                outside = isinstance(x.native, fx.Node) and not self.inside(x.native, path)
                if path and outside and not self._read_in(y, path):
                    return NormModule(path, axis - (x.rank or 0), weight, bias)
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
        path, module = found.path, self.module.get_submodule(found.path)
        if any(map(hooked, module.modules())):
            return f"its module {path} has hooks, or another forward function than its class"
        kept = module.state_dict().keys() - dict(module.named_parameters(remove_duplicate=False)).keys()
        if kept or any(target.startswith(f"{path}.") for target in self.written):
            return f"its module {path} keeps a state of its own"
        expected = {n for n in ("weight", "bias") if getattr(module, n, None) is not None}
        own = {n for n, _ in module.named_parameters()}
        if own != expected or {n for n, e in (("weight", found.weight), ("bias", found.bias)) if e} != expected:
            return f"its module {path} has other parameters than a weight and a bias"
        plain = offset_of(found.weight) is not None and offset_of(found.bias) == 0.0
        return None if plain else f"its module {path} computes its weight"

    def unfit_approximated(self, site: Site, inner: Site) -> str | None:
        """The same where its bias is edited."""
        bias = inner.norm.bias
        native = bias[0][1][0][0].native if bias is not None and plain(bias) else None
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
            key = self.known.get(found.path)
            paths[key] = found.path
            called.setdefault(key, {})[site] = found.axis, inner.norm.size, inner.norm.eps, offset_of(found.weight)
        out: dict[Site, str] = {}
        for key, ways in called.items():
            times = len(self.calls[key])
            if len(ways) != times or len(set(ways.values())) > 1:
                why = f"its module {paths[key]} is called {times} times, and not all of them are converted"
                out |= dict.fromkeys(ways, why)
        return out


def offset_of(expr: Expr | None) -> float | None:
    """The number that is added to the parameter of a module that a weight or bias is, in its own type and before casts;
    None where it is something else."""
    if expr is None:
        return 0.0
    if not plain(expr):
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


def _by_heads(site: Site) -> Iterator[tuple[Value, Value, int, Expr, Expr | None]]:
    """A norm of each head, times a weight for each, and plus a bias for each: (x, the result, axis, weight, bias)."""
    x, axis = site.norm.x, site.norm.axes[0]
    given, made = (PRECISION.get(v.dtype or "", 0) for v in (_uncast(x), site.value))
    if site.norm.weight is not None or site.norm.bias is not None or axis - (x.rank or 0) != -1 or made < given:
        return
    scaled = _with_parameter(site.value, "mul")
    if scaled is None:
        return
    if added := _with_parameter(scaled[0], "add"):
        yield x, _narrowed(added[0], x), axis, scaled[1], added[1]
    yield x, _narrowed(scaled[0], x), axis, scaled[1], None


def _with_parameter(value: Value, kind: str) -> tuple[Value, Expr] | None:
    """What a value is, casts to wider types aside, times a parameter that has its last axes, or plus one, and this."""
    while len(value.uses) == 1 and not value.kept and value.uses[0].kind in ("cast", "identity"):
        wide = value.uses[0].outputs[0]
        if PRECISION.get(wide.dtype or "", 0) < PRECISION.get(value.dtype or "", 0):
            return None
        value = wide
    alone = len(value.uses) == 1 and not value.kept
    node = value.uses[0] if alone and value.uses[0].kind == kind else None
    rest = [v for v in node.inputs if v is not value] if node is not None else []
    if node is None or len(rest) != 1:
        return None
    parameter, out = _uncast(rest[0]), node.outputs[0]
    shape = parameter.shape
    fits = out.shape is not None and shape == out.shape[-len(shape or out.shape):]
    return (out, ((1.0, ((rest[0], 1),)),)) if fits and parameter.producer is None else None


def _narrowed(value: Value, x: Value) -> Value:
    """A value, or the cast of it to the type that x had outside."""
    alone = len(value.uses) == 1 and not value.kept
    cast = value.uses[0] if alone and value.uses[0].kind == "cast" else None
    return cast.outputs[0] if cast is not None and cast.outputs[0].dtype == _uncast(x).dtype else value
