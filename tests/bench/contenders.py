"""Whose files are measured against each other: other tools', ours for each target, and which of them run the same."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

import normfuse
from normfuse import ort as library
from normfuse.bench import How
from normfuse.sessions import PROVIDERS, open_session, options_for
from tests.bench.peers import onnxscript_ort, onnxsim
from tests.node_cases import Arrays

FASTEST = "normfuse fastest"
OPERATORS = ("normfuse normfuse", "normfuse after onnxscript", "normfuse after onnxsim", FASTEST)
"""The contenders that run with our library of operators."""
Tool = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Job:
    """One model, its type and its inputs by name."""

    name: str
    dtype: str
    path: Path
    inputs: dict[str, Arrays]


def runtime(provider: str) -> Tool:
    """ONNX Runtime's own optimiser, saved."""

    def run(source: Path, target: Path) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(target)
        ort.InferenceSession(str(source), options, providers=[provider])

    return run


def ours(target: Any, first: str = "") -> Tool:
    """NormFuse for a target, with another tool before it."""
    return lambda source, out: void(normfuse.rewrite(source, out, normfuse.Config(target=target, first=first)))


def void(_: object) -> None:
    """Nothing."""


def contenders(provider: str) -> dict[str, Tool]:
    """Whoever makes a file, by name; those with "normfuse" in it are ours."""
    others: dict[str, Tool] = {"onnxruntime": runtime(PROVIDERS[provider]), "onnxscript": onnxscript_ort,
                               "onnxsim": onnxsim}  # fmt: skip
    return others | {f"normfuse {t}": ours(t) for t in ("onnx", f"ort-{provider}", "normfuse")} | {
        f"normfuse after {tool}": ours("normfuse", tool) for tool in ("onnxscript", "onnxsim")}  # fmt: skip


def session(path: Path, threads: int, provider: str, operators: bool) -> ort.InferenceSession:
    """A session as `normfuse bench` makes it; with `operators`, the library is loaded."""
    made = open_session(path, provider, threads, operators)
    assert made.get_providers()[0] == PROVIDERS[provider]
    return made


@dataclass
class Files:
    """The file of each contender, whose file runs as some others do, why there is none of some, and who runs what."""

    made: dict[str, Path]
    same: dict[str, str]
    lost: dict[str, str]
    runs: dict[str, str]

    def add(self, name: str, path: Path, provider: str) -> None:
        """One more, that is not measured where another runs as it does."""
        self.made.pop(name, None)
        self.same.pop(name, None)
        same = self.runs.setdefault(loaded(path, provider, operators(name)), name)
        if same == name:
            self.made[name] = path
        else:
            self.same[name] = same


def operators(name: str) -> bool:
    """Whether a contender runs with our library."""
    return name in OPERATORS and library.library_path() is not None


def files(job: Job, provider: str, folder: Path) -> Files:
    """What the contenders make of a model."""
    out = Files({"input": job.path}, {}, {}, {loaded(job.path, provider, False): "input"})
    for name, tool in contenders(provider).items():
        path = folder / f"{name.replace(' ', '-')}.onnx"
        path.unlink(missing_ok=True)
        try:
            tool(job.path, path)
            session(path, 1, provider, False).run(None, next(iter(job.inputs.values())))
        except Exception as why:  # a tool that does not take the model, or breaks it, is no reason to stop
            said = str(why).replace(f"{folder}{os.sep}", "").splitlines()[0]
            out.lost[name] = f"{type(why).__name__}: {said[:100]}"
            continue
        out.add(name, path, provider)
    return out


def fastest(job: Job, files: Files, threads: int, provider: str, folder: Path) -> str:
    """Add what `first="fastest"` makes with so many threads, and say what that is. It measures on a sample's inputs."""
    path, sample = folder / "fastest.onnx", folder / "sample.npz"
    how = How(threads)
    if "sample" in job.inputs:
        given: dict[str, Any] = dict(job.inputs["sample"])
        np.savez(sample, **given)
        how = replace(how, inputs=str(sample))
    files.runs.pop(next((digest for digest, name in files.runs.items() if name == FASTEST), ""), None)
    config = normfuse.Config(target="normfuse", first="fastest")
    report = normfuse.rewrite(job.path, path, config, how=how, overwrite=True)
    files.add(FASTEST, path, provider)
    return report.notes[0]


def loaded(path: Path, provider: str, with_library: bool) -> str:
    """A digest of the nodes that ONNX Runtime runs for a file: of each, what it does to which constants and inputs, in
    whatever order and under whatever names."""
    saved = path.with_name(f"loaded-{os.getpid()}.onnx")  # it refers to data beside the model
    options = options_for(path, provider, 1, with_library)
    options.optimized_model_filepath = str(saved)
    try:
        open_session(path, provider, 1, with_library, options)
        graph = onnx.load(saved).graph
    finally:
        saved.unlink(missing_ok=True)
    known = {i.name: i.name for i in graph.input} | {"": ""}
    known |= {t.name: _digest(onnx.numpy_helper.to_array(t).tobytes(), t.data_type, t.dims) for t in graph.initializer}
    nodes = []
    for node in graph.node:
        attributes = sorted(a.SerializeToString(deterministic=True) for a in node.attribute)
        nodes.append(_digest(b"".join(attributes), node.domain, node.op_type, [known.get(i, i) for i in node.input]))
        known |= {out: f"{nodes[-1]} {i}" for i, out in enumerate(node.output)}
    return _digest(b"", sorted(nodes), [known[o.name] for o in graph.output])


def _digest(data: bytes, *more: object) -> str:
    return hashlib.sha256(data + repr(more).encode()).hexdigest()
