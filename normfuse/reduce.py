"""The smallest model that still goes wrong: for a bug report, from a model whose rewrite crashes or changes outputs.

First the failure is named. Then each norm is tried alone, which finds the one to blame, and every cut that may keep the
failure: outputs are dropped, ranges of nodes taken out, control flow and functions opened. What a missing node gave
becomes an input of the graph. A cut stays if the rewrite of what is left goes wrong in the same way.
"""

from __future__ import annotations

import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from normfuse import cuts
from normfuse.api import optimize
from normfuse.config import Config, config_of, demand_use
from normfuse.distance import distance
from normfuse.errors import InputError, NormFuseError, UnsupportedError, first_line, path_of
from normfuse.frontends.onnx_model import OnnxModel
from normfuse.frontends.onnx_open import possible_sizes
from normfuse.frontends.onnx_wide import compare_rewritten
from normfuse.io import files
from normfuse.norm import region
from normfuse.sessions import run_random, session
from normfuse.verify import EPSILON, roundings_for

Progress = Callable[[str, float], None]
HELD = 2.0**-30
"""The rounding asked of float64, less than its own: operators hold eps in float32."""
MAX_TRIES = 4000
"""Rewrites after which the smallest model so far is given back."""


@dataclass(frozen=True, slots=True)
class Failure:
    """How a rewrite goes wrong: `kind` is crash, invalid, rolled back or different; `place` tells failures of a kind
    apart, and `message` is for people."""

    kind: str
    place: str
    message: str


@dataclass(frozen=True, slots=True)
class Reduced:
    """What came of a reduction; `norms` are the names of the norms that the rewrite of the result finds."""

    failure: str
    message: str
    norms: list[str]
    nodes_before: int
    nodes_after: int
    tries: int

    def to_dict(self) -> dict[str, Any]:
        """A plain dict, ready for JSON."""
        return asdict(self)


def reduce(src_path: str | Path, dst_path: str | Path, config: Config | None = None, *, overwrite: bool = False,
           progress: Progress | None = None) -> Reduced | None:  # fmt: skip
    """Reduce an ONNX file and save the result, whole or not at all; None, and nothing is written, where nothing fails.

    Raises `InputError` or `UnsafeModelError` for a file that is no model, `UnsupportedError` for one above 2 GiB.
    """
    source, target = path_of(src_path, "the input"), path_of(dst_path, "the output")
    model = files.read_onnx(source)[0]
    put = files.check_target(source, target, overwrite, in_place=None)
    try:
        proto: onnx.ModelProto = ir.to_proto(ir.external_data.load_to_model(model))
        proto.SerializeToString()
    except Exception as why:
        raise UnsupportedError(f"{source}: its weights do not fit into one message of 2 GiB") from why
    done = reduce_model(proto, config, progress)
    if done is None:
        return None
    files.write_bytes(done[0].SerializeToString(), target, put=put)
    return done[1]


def reduce_model(model: onnx.ModelProto, config: Config | None = None,
                 progress: Progress | None = None) -> tuple[onnx.ModelProto, Reduced] | None:  # fmt: skip
    """The smallest model found whose rewrite fails as that of `model` does, or None where it does not fail."""
    config = config_of(config)
    demand_use(config, None)
    if config.verify == "model":  # the whole model is compared in any case
        config = replace(config, verify="sites")
    if config.layernorm_to_rmsnorm == "approximate":
        raise UnsupportedError("an approximate conversion is calibrated on whole inputs; reduce takes off or exact")
    with tempfile.TemporaryDirectory(prefix="normfuse-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _Search(config, Path(folder), progress or (lambda what, share: None)).run(model)


# -- what goes wrong ----------------------------------------------------------------------------------------------


def failure_of(model: onnx.ModelProto, config: Config, folder: Path) -> Failure | None:
    """How the rewrite of a model goes wrong, or None; `NormFuseError` for a model that cannot be rewritten."""
    try:
        made, report = optimize(model, config)
    except NormFuseError:
        raise
    except Exception as why:
        frame = traceback.extract_tb(why.__traceback__)[-1]
        kind = type(why).__name__
        return Failure("crash", f"{kind} {frame.name}", f"{kind} in {frame.name}: {first_line(why)}")
    for refusal in report.refusals:
        if refusal.code == "NF201":
            return Failure("rolled back", "", f"{refusal.node}: {refusal.message}")
    return _difference(model, made, config, folder)


def _difference(model: onnx.ModelProto, made: onnx.ModelProto, config: Config, folder: Path) -> Failure | None:
    """What ONNX Runtime says of a model and its rewrite, on random rows, tiny ones and zeros."""
    paths = folder / "before.onnx", folder / "after.onnx"
    for path, proto in zip(paths, (model, made), strict=True):
        path.write_bytes(proto.SerializeToString())
    try:
        before = session(paths[0])
    except InputError as why:
        raise InputError(f"the model itself does not run: {_said(why, paths)}") from None
    known = True  # to onnx, of which ONNX Runtime's own operators in its domain are not
    try:
        onnx.checker.check_model(model)
    except Exception:
        known = False
    try:
        if known:
            onnx.checker.check_model(made)
        after = session(paths[1])
    except Exception as why:
        return Failure("invalid", "", f"the rewritten model does not load: {_said(why, paths)}")
    try:
        sizes = possible_sizes(files.read_onnx(paths[0])[0])
        feeds, tops = run_random(before, None, sizes=sizes)[0], dict[int, float]()
        bound = roundings_for(config.converts)
    except Exception as why:
        raise InputError(f"the model itself does not run: {_said(why, paths)}") from why
    for scale in (1.0, 1e-3, 0.0):
        given = {k: (v * scale).astype(v.dtype) if v.dtype.kind == "f" else v for k, v in feeds.items()}
        for i, (a, b) in enumerate(zip(before.run(None, given), after.run(None, given), strict=True)):
            name, message = before.get_outputs()[i].name, _apart(a, b, tops.setdefault(i, _top(a)), bound)
            if message and not compare_rewritten(*paths, inputs=given, roundings=bound)["equal"]:
                return Failure("different", "", f"output {name!r} {message}")
    return None


def _said(why: Exception, paths: Iterable[Path]) -> str:
    """What went wrong, without the files that are there for a moment."""
    said = first_line(why)
    for path in paths:
        said = said.replace(f"{path}: ", "").replace(str(path), "it")
    return said


def _top(x: Any) -> float:
    if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
        return 0.0
    return float(np.max(np.abs(x[np.isfinite(x)]), initial=0.0))


def _apart(a: Any, b: Any, top: float, bound: float) -> str:
    """In what an output and that of the rewrite differ, or nothing; `top` is its largest element on random rows."""
    if not isinstance(a, np.ndarray) or a.dtype.kind not in "fiub":
        return "" if repr(a) == repr(b) else "has another value"
    if a.shape != b.shape or a.dtype != b.dtype:
        return "has another shape or type"
    gap = distance(a.astype(np.float64), b.astype(np.float64))
    unit = max(EPSILON.get(str(a.dtype), 0.0), HELD if a.dtype == np.float64 else 0.0)
    allowed = bound * unit * max(top, _top(a))
    return "" if gap <= allowed else f"differs by {gap:.2g}, of {max(top, _top(a)):.2g} at most"


def _regions(model: onnx.ModelProto, config: Config) -> Iterator[list[str]]:
    """Of each norm in the main graph, the names of what is computed between its input and its result."""
    try:
        found = OnnxModel(ir.serde.deserialize_model(model), config, rewrite=False).plans[0].found
    except Exception:  # it is the reading that crashes: there are no norms to go by
        return
    for site in found.sites:
        natives = [v.native for node in region(site.value, site.norm) for v in node.outputs]
        yield [v.name for v in natives if v is not None]


# -- the search -----------------------------------------------------------------------------------------------------


class _Search:
    def __init__(self, config: Config, folder: Path, progress: Progress) -> None:
        self.config, self.folder, self.progress = config, folder, progress
        self.tries = 0
        self.failure: Failure | None = None

    def run(self, model: onnx.ModelProto) -> tuple[onnx.ModelProto, Reduced] | None:
        self.failure = failure_of(model, self.config, self.folder)
        if self.failure is None:
            return None
        best, size = self._one_norm(self._kept(model, cuts.inlined)), cuts.count(model)
        while True:
            best = self._once(best)
            if cuts.count(best) >= size or self.tries >= MAX_TRIES:
                break
            size = cuts.count(best)
        found = failure_of(best, self.config, self.folder)
        assert found is not None
        norms = [] if found.kind == "crash" else [n.name for n in optimize(best, self.config)[1].norms]
        return best, Reduced(found.kind, found.message, norms, cuts.count(model), cuts.count(best), self.tries)

    def _one_norm(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """The nodes of the one norm that is to blame, alone or with those next to it; the model if there is none."""
        cutter = cuts.Cutter(model)
        maker = {name: i for i, node in enumerate(model.graph.node) for name in node.output}
        readers: dict[str, list[int]] = {}
        for i, node in enumerate(model.graph.node):
            for name in cuts.read_by(node):
                readers.setdefault(name, []).append(i)
        for names in _regions(model, self.config):
            inner = {maker[name] for name in names if name in maker}
            beside = {maker[name] for i in inner for name in cuts.read_by(model.graph.node[i]) if name in maker}
            behind = {i for name in names for i in readers.get(name, ())}
            for keep in (inner, inner | beside | behind):
                if keep and self._fails(lambda keep=keep: cutter.cut(sorted(keep))):  # type: ignore[misc]
                    return cutter.cut(sorted(keep))
        return model

    def _once(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """One round of every kind of cut."""
        for change in (cuts.inlined, cuts.constants_held, *(cuts.opened(k) for k in range(8))):
            model = self._kept(model, change)
        model = self._outputs(model)
        cutter = cuts.Cutter(model)
        nodes = list(range(len(model.graph.node)))
        parts = 2
        while len(nodes) > 1:
            step = max(1, len(nodes) // parts)
            at, cut = 0, False
            while at < len(nodes):
                left = nodes[:at] + nodes[at + step :]
                if left and self._fails(lambda left=left: cutter.cut(left)):  # type: ignore[misc]
                    nodes, cut = left, True
                else:
                    at += step
                self.progress(f"{len(nodes)} nodes left", min(0.95, self.tries / MAX_TRIES))
            if step == 1 and not cut:
                break
            parts = parts if cut and step > 1 else min(parts * 2, len(nodes))
        return self._outputs(cutter.cut(nodes) if len(nodes) < len(model.graph.node) else model)

    def _kept(self, model: onnx.ModelProto, change: Callable[[onnx.ModelProto], onnx.ModelProto]) -> onnx.ModelProto:
        """The changed model, if it still fails."""
        found: list[onnx.ModelProto] = []

        def build() -> onnx.ModelProto:
            found.append(change(model))
            return found[0]

        return found[0] if self._fails(build) else model

    def _outputs(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Drop outputs as long as it fails, and the nodes that none of the others needs."""
        for output in list(model.graph.output):
            if len(model.graph.output) > 1:
                others = [o.name for o in model.graph.output if o.name != output.name]
                model = self._kept(model, lambda m, others=others: cuts.with_outputs(m, others))  # type: ignore[misc]
        return model

    def _fails(self, build: Callable[[], onnx.ModelProto]) -> bool:
        """Whether a model fails as the first one did; one that cannot be built, or is no model, does not."""
        if self.tries >= MAX_TRIES:
            return False
        self.tries += 1
        try:
            candidate = build()
            onnx.checker.check_model(candidate)
            found = failure_of(candidate, self.config, self.folder)
        except Exception:
            return False
        assert self.failure is not None
        return found is not None and (found.kind, found.place) == (self.failure.kind, self.failure.place)
