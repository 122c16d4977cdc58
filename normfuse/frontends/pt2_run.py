"""Running what is in .pt2 archives, once somebody trusts them: to compare two programs, and to calibrate one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.export
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from normfuse.calibrate import named_batches
from normfuse.errors import InputError, NormFuseError, UnsafeModelError, first_line
from normfuse.frontends import pt2
from normfuse.frontends.fx_certify import with_own_state
from normfuse.frontends.fx_meta import dtype_of, is_tensor, meta_of, shape_of
from normfuse.frontends.pt2_graph import Described, Unknown
from normfuse.io.pt2 import Archive
from normfuse.ort_values import Array
from normfuse.verify import ROUNDINGS, compare_outputs


def demand_trust(source: Path, trust: bool) -> None:
    """Raise `UnsafeModelError` for an archive that is not trusted, by True itself."""
    if trust is not True:
        raise UnsafeModelError(f"{source}: loading a .pt2 can run code in it; if you trust its origin, allow it with "
                               "trust=True")  # fmt: skip


def load(source: Path) -> torch.export.ExportedProgram:
    """The program of an archive, loaded by torch, which can run code in it."""
    try:
        return torch.export.load(source)
    except Exception as why:
        unknown = _unknown(source)
        text = f"it calls {unknown}, which no library registers that is imported here" if unknown else first_line(why)
        raise InputError(f"{source}: torch.export.load does not load it: {text}") from why


def _unknown(source: Path) -> str:
    """An operator of the program that is not known in this process."""
    try:
        with Archive(source) as archive:
            program = pt2.Program(archive, archive.json(f"models/{archive.model()}.json"), archive.model())
    except NormFuseError:
        return ""
    modules = [m for m in program.graph_module.modules() if isinstance(m, Described)]
    return next((str(n.target) for m in modules for n in m.graph.nodes if isinstance(n.target, Unknown)), "")


# -- inputs -----------------------------------------------------------------------------------------------------------


def batches(program: Any, given: Any, what: str = "calibration set") -> list[list[torch.Tensor]]:
    """Inputs of a program, flat, from arrays by the names that its graph has for them: paths as for an ONNX model.

    `what` messages call a set of them. Raises `InputError` for inputs that do not fit.
    """
    inputs: dict[str, tuple[Sequence[Any], Any]] = {}
    types: dict[str, torch.dtype] = {}
    wanted = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in wanted:
            meta = meta_of(node)
            if not is_tensor(meta):
                raise InputError(f"input {node.name} of the program is no tensor; give inputs from Python")
            types[node.name] = meta.dtype
            plain = np.dtype("float32" if meta.dtype == torch.bfloat16 else dtype_of(meta))
            inputs[node.name] = shape_of(meta) or (), plain
    return [[torch.from_numpy(np.ascontiguousarray(batch[name])).to(types[name]) for name in inputs]
            for batch in named_batches(given, inputs, what)]  # fmt: skip


# -- two programs -----------------------------------------------------------------------------------------------------


def compare_files(a: Path, b: Path, *, trust: bool, seed: int = 0,
                  inputs: Mapping[str, Array] | None = None) -> dict[str, Any]:  # fmt: skip
    """What `normfuse.verify.compare_models` says, of two archives: on arrays by name, or the inputs saved with `a`."""
    for path in (a, b):
        with Archive(path) as archive:
            archive.model()
        demand_trust(path, trust)
    one, other = load(a), load(b)
    specs = [tree_flatten(p.example_inputs)[1] if p.example_inputs is not None else None for p in (one, other)]
    names = [list(p.graph_signature.user_inputs) for p in (one, other)]
    if len(names[0]) != len(names[1]) or (None not in specs and specs[0] != specs[1]):
        raise InputError(f"the programs have other inputs: {names[0]} and {names[1]}")
    flat = None if inputs is None else batches(one, [inputs], "set of inputs")[0]
    return compare(a, one, other, ROUNDINGS, seed, flat)


def compare(source: Path, program: Any, result: Any, roundings: float, seed: int = 0,
            flat: Sequence[Any] | None = None) -> dict[str, Any]:  # fmt: skip
    """What `compare_outputs` says of two programs on the inputs given, or else on those that were saved with the first.

    Raises `InputError` where there are none, where one does not run on them, or the outputs are not as many.
    """
    if flat is None and program.example_inputs is None:
        raise InputError(f"{source}: no example inputs are saved with the program to run it on; for `rewrite` use "
                         "verify='sites', for `verify` give --inputs")  # fmt: skip
    outputs = []
    for one in (program, result):
        made = program.example_inputs if flat is None else tree_unflatten(list(flat), program.call_spec.in_spec)
        args, kwargs = copy.deepcopy(made)
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(seed)
                outputs.append([_array(v) for v in tree_leaves(with_own_state(one.module())(*args, **kwargs))])
        except Exception as why:
            raise InputError(f"{source}: the program does not run on these inputs: {first_line(why)}") from why
    if len(outputs[0]) != len(outputs[1]):
        raise InputError(f"the programs have other outputs: {len(outputs[0])} and {len(outputs[1])}")
    names = [str(name) for name in program.graph_signature.user_outputs]
    if len(names) != len(outputs[0]):
        names = [f"output {i}" for i in range(len(outputs[0]))]
    return compare_outputs(names, outputs[0], outputs[1], roundings, "torch")


def _array(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    if value.dtype == torch.bfloat16:
        import ml_dtypes

        return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    try:
        return value.numpy()
    except TypeError:  # what numpy has no type for
        return value.to(torch.float64).numpy().astype(np.float32)
