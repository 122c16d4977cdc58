"""What norms cost in ONNX Runtime on the CPU: their share of the time, and how fast they move what they have to."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfuse.errors import NormFuseError
from normfuse.ort_values import Array
from normfuse.sessions import open_session, options_for

if TYPE_CHECKING:
    import onnx_ir as ir

PROFILED = 5
"""Runs that the share of norms is taken from."""
NORMS = frozenset(
    """LayerNormalization RMSNormalization SimplifiedLayerNormalization SkipLayerNormalization
    SkipSimplifiedLayerNormalization EmbedLayerNormalization""".split()
)
CONTROL = ("If", "Loop", "Scan")


@dataclass(frozen=True, slots=True)
class Norms:
    """What norms cost on the CPU: their `share` of the time of all operators, their `rate` in GB/s, and how many bytes
    one of them moves, 0 where that is not known. Each tensor that a norm has to read or to write counts once.
    """

    share: float | None = None
    rate: float | None = None
    moved: int = 0


def profile(path: str, feeds: dict[str, Array], threads: int, operators: bool) -> Norms:
    """What norms cost.

    Norm operators count whole, those that take in an addition too, and so do calls of our functions. Of a decomposed
    norm, the operators of its region count, by name: where ONNX Runtime runs none of them under its name, nobody knows.
    """
    options = options_for(path, "cpu", threads, operators)
    with tempfile.TemporaryDirectory(prefix="normfuse-") as folder:
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "run")
        events = _events(open_session(path, "cpu", threads, operators, options), feeds)
    regions, functions = norms_of(path)
    timed = [_Timed(e) for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    timed = _typical([e for e in timed if e.op not in CONTROL])
    seen = {e.name for e in timed}
    if regions is None or not timed or any(seen.isdisjoint(region) for region in regions):
        return Norms()
    whole = [e for e in timed if e.op in NORMS or e.op in functions]
    other = [e for e in timed if not (e.op in NORMS or e.op in functions)]
    inlined = [e for e in other if e.name.startswith(tuple(f"_inlfunc_{function}" for function in functions))]
    parts = frozenset().union(*regions)
    rest = [e for e in other if e.name in parts]
    took = sum(e.took for e in (*whole, *inlined, *rest))
    share = took / max(sum(e.took for e in timed), 1.0)
    fused = {e.name for e in whole}  # by ONNX Runtime, under the name of one of the operators
    ends = {max((e for e in rest if e.name in region), key=lambda e: e.place).name
            for region in regions if fused.isdisjoint(region)}  # fmt: skip
    moved = [e.read + e.written for e in whole] + [2 * e.written for e in rest if e.name in ends]
    if inlined or not took or not all(moved) or not moved:
        return Norms(share)
    return Norms(share, sum(moved) / took / 1e3, sum(moved) // len(moved))


class _Timed:
    """A run of an operator: how many microseconds it took, and the bytes of the tensors it reads and writes."""

    def __init__(self, event: Mapping[str, Any]) -> None:
        about = event["args"]
        self.name = re.sub(r"(/+\w*Fusion\w*/)+$", "", re.sub(r"_kernel_time$", "", event["name"]))
        self.op, self.took = str(about.get("op_name", "")), float(event["dur"])
        self.place = int(about.get("node_index", 0))
        self.read, self.written = int(about.get("activation_size", 0)), int(about.get("output_size", 0))


def _typical(timed: list[_Timed]) -> list[_Timed]:
    """One run, each operator with the median of its times, since a single one that waits takes longer than all others;
    all runs but the first, which allocates, where they are not alike."""
    size = len(timed) // (PROFILED + 1)
    runs = [timed[i * size : (i + 1) * size] for i in range(1, PROFILED + 1)]
    if len(timed) != size * (PROFILED + 1) or any([e.name for e in run] != [e.name for e in runs[0]] for run in runs):
        return timed[size:]
    for found, *others in zip(*runs, strict=True):
        found.took = statistics.median([found.took, *(e.took for e in others)])
    return runs[0]


def _events(session: Any, feeds: dict[str, Array]) -> list[dict[str, Any]]:
    """The profile of some runs."""
    for _ in range(PROFILED + 1):
        session.run(None, feeds)
    text = Path(session.end_profiling()).read_text("utf-8", "replace")
    try:
        found: list[dict[str, Any]] = json.loads(text, strict=False)
    except ValueError:  # ONNX Runtime does not say when the disk is full
        return []
    return found


def norms_of(path: str) -> tuple[list[frozenset[str]] | None, frozenset[str]]:
    """What ONNX Runtime calls the operators of each decomposed norm (None: cannot be read), and our functions."""
    from normfuse.config import Config
    from normfuse.frontends.onnx_emit import DOMAIN
    from normfuse.frontends.onnx_model import OnnxModel
    from normfuse.frontends.onnx_softmax import is_norm
    from normfuse.io.files import read_onnx
    from normfuse.norm import region

    try:
        model = read_onnx(path)[0]
        one = OnnxModel(model, Config(), rewrite=False)
    except NormFuseError:
        return None, frozenset()
    names = {node: node.name or f"{node.op_type}_{i}" for i, node in enumerate(model.graph)}

    def called(node: ir.Node) -> str:
        return names.get(node, node.name or "")

    regions = []
    for found in (p.found for p in one.plans):
        for site in found.sites:
            natives = {n.native for n in region(site.value, site.norm) if n.native is not None}
            own = any(n.op_type in NORMS or n.domain == DOMAIN for n in natives)
            regions += [] if own else [frozenset(map(called, natives))]
    return regions, frozenset(f.name for f in model.functions.values() if is_norm(f.domain, f.name))
