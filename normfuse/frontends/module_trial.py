"""A module and the graph that was traced from it, run side by side."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from normfuse.calibrate import Hook
from normfuse.distance import worst
from normfuse.frontends.fx_certify import run_all, with_own_state
from normfuse.frontends.fx_convert import tensors_of
from normfuse.graph import Value
from normfuse.ort_values import Array


def own_inputs(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs again, which a module may write."""
    return copy.deepcopy((tuple(args), dict(kwargs or {})))


def outputs_of(out: Any) -> list[torch.Tensor]:
    """The tensors that a module gives, in order."""
    if hasattr(out, "to_tuple"):
        out = out.to_tuple()
    return [v for v in tree_flatten(out)[0] if isinstance(v, torch.Tensor)]


def apart(want: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> float:
    """The largest difference of two lists of outputs, each relative to its largest element."""
    if len(want) != len(got):
        return math.inf
    return worst(*([v.double().cpu().numpy() for v in outputs] for outputs in (want, got)))


class Trial:
    """A module and the graph that was traced from it, which run side by side on the example inputs: what a hook sees
    first is a value of the graph if to change the one does to the outputs what it does to change the other.

    Parameters that are next to nothing, as those of a branch that is not trained yet, would hide that, and are drawn at
    random.
    """

    FAR = 1e-3
    """How far a change has to move an output at least. Two runs, the graph's on the CPU, may differ by a twentieth of
    how far it does."""

    def __init__(self, module: nn.Module, program: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> None:
        self.module, self.program, self.given = module, program, (args, kwargs)

    @cached_property
    def _own(self) -> Any:
        random = torch.Generator().manual_seed(0)
        memo = {id(p): nn.Parameter(torch.randn(p.shape, generator=random).to(p), p.requires_grad)
                if p.numel() and p.is_floating_point() and p.abs().max() < self.FAR else p
                for p in self.module.parameters()}  # fmt: skip
        own = copy.deepcopy(self.module, memo)
        for part in own.modules():
            part.training = False
        return own

    @cached_property
    def _constants(self) -> dict[str, torch.Tensor]:
        drawn = dict(self._own.named_parameters(remove_duplicate=False))
        targets = {spec.arg.name: spec.target for spec in self.program.graph_signature.input_specs}
        return {name: drawn.get(targets[name], held) for name, held in tensors_of(self.program).items()}

    def _traced(self, watch: Mapping[str, Hook]) -> list[torch.Tensor]:
        """The outputs, behind those that are written to buffers."""
        feeds = tree_flatten(own_inputs(*self.given))[0]
        return run_all(self.program.graph_module, [feeds], self._constants, self._constants.__getitem__, wide=False,
                       watch=watch)[0]  # fmt: skip

    @cached_property
    def _unchanged(self) -> list[torch.Tensor]:
        return self._traced({})

    @cached_property
    def firsts(self) -> dict[str, tuple[Any, Any]]:
        """For each module by path the shape and type of what a hook of it sees first of its inputs and of its output;
        none for a module that runs when it is traced only."""
        own, found = with_own_state(self._own), dict[str, tuple[Any, Any]]()

        def watch(path: str) -> Any:
            def hook(_: nn.Module, given: Any, output: Any) -> None:
                found[path] = _kind(_first(given)), _kind(_first(output))

            return hook

        for path, part in own.named_modules(remove_duplicate=False):
            part.register_forward_hook(watch(path))
        args, kwargs = own_inputs(*self.given)
        with torch.no_grad(), contextlib.suppress(Exception):
            own(*args, **kwargs)
        return found

    def same(self, value: Value, path: str, before: bool) -> bool:
        """Whether a value is the first of what goes into a module (`before`) or comes out of it."""

        def change(array: Array) -> Array:
            noise = np.random.default_rng(0).standard_normal(array.shape)
            return array + noise * max(1.0, float(np.abs(array).max(initial=0.0)))

        def first(given: Any) -> Any:
            x = _first(given)
            changed = torch.from_numpy(change(x.double().cpu().numpy())).to(x)
            return (changed, *given[1:]) if isinstance(given, tuple) else changed

        part = self._own.get_submodule(path)
        hook = part.register_forward_pre_hook(lambda _, given: first(given)) if before else (
            part.register_forward_hook(lambda _, given, output: first(output)))
        args, kwargs = own_inputs(*self.given)
        try:
            with torch.no_grad():
                got = outputs_of(with_own_state(self._own)(*args, **kwargs))
            want = self._traced({value.native.name: lambda values: [change(v) for v in values]})[-len(got):]
            moved = apart(self._unchanged[-len(got):], want)
            return moved > self.FAR and apart(want, got) <= moved / 20
        except Exception:  # a module that runs when it is traced only, say
            return False
        finally:
            hook.remove()


def _first(given: Any) -> Any:
    return given[0] if isinstance(given, tuple) and given else given


def _kind(value: Any) -> Any:
    return (tuple(value.shape), str(value.dtype)) if isinstance(value, torch.Tensor) else None
