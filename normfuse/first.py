"""Optimisers of others that go first, each in a process of its own, kept only where the model computes the same.

Fusing attention and folding scales is no work of NormFuse's; onnxscript and onnxsim do it, on most models.
"""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from normfuse.config import FASTEST, Config
from normfuse.errors import InputError, NormFuseError, VerificationError, first_line
from normfuse.frontends.onnx_open import possible_sizes
from normfuse.io import files
from normfuse.process import run_module
from normfuse.sessions import Given, longest, session
from normfuse.verify import demand_compared, difference

if TYPE_CHECKING:
    from normfuse.bench import How
    from normfuse.report import Report

SECONDS = 900.0
"""How long one of them may take; onnxscript takes a minute for 13,000 operators."""
LIMIT = 2**31 - 2**24
"""The most bytes of weights: each of them writes the model as one message."""
LENGTHS, SESSIONS = (33, 130), 2
"""How long the second inputs are on which outputs are compared, of these the last for which two sessions have memory:
some mistakes in attention show on longer ones only."""
OUT = "did not go first"
"""What a note says of an optimiser that was left out."""
Progress = Callable[[str, float], None]
Tried = Callable[[Path], str | None]
"""Says why a file does not run, or nothing; None where that is not known."""


def check(config: Config, how: How | None) -> None:
    """Raise `InputError` where an optimiser that is asked for is not installed, or `how` says what nothing asks for."""
    if how is not None:
        from normfuse.bench import demand_how

        demand_how(how)
        if config.first != FASTEST and not (how.sizes or how.inputs):
            raise InputError(f"how= says how first={FASTEST!r} measures, and first is {config.first!r}; leave it out")
        if not config.runs:
            raise InputError("how= says on what models are run, and none is; it takes verify='model', "
                             "layernorm_to_rmsnorm='exact', or first='...'")  # fmt: skip
    for tool in config.optimisers:
        if importlib.util.find_spec(tool) is None:
            raise InputError(f"first={config.first!r}: {tool} is not installed; pip install {tool}")


@dataclass(slots=True)
class Made:
    """The path of the last result that is kept, or of the model itself, and the optimisers to call it by.

    `operators` of the model that was given; a line on each optimiser; with "fastest", what was measured, and whether
    the model `stays` as it is.
    """

    path: Path
    first: str = ""
    operators: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    fastest: dict[str, Any] | None = None
    stays: bool = False

    def tell(self, report: Report) -> None:
        """Put it into the report on the rewrite, which begins with the model that was given."""
        if self.operators:
            report.operators_before, report.nodes_before = self.operators, sum(self.operators.values())
        report.notes[:0] = self.notes
        report.fastest = self.fastest


def run(source: Path, config: Config, folder: Path, progress: Progress | None = None, how: How | None = None,
        given: Given | None = None) -> Made:  # fmt: skip
    """Let the optimisers of `config.first` have a model, and leave what they make in `folder`.

    `how` is for "fastest" (`normfuse.fastest.choose`); outputs are compared on what is `given`.
    """
    given = given or Given()
    if config.first == FASTEST:
        from normfuse import fastest

        return fastest.choose(source, config, folder, how, given, progress)
    tried = partial(cuda, given=given) if config.target == "ort-cuda" else lambda path: ""
    return replace(after(config.optimisers, {(): Made(source)}, folder, given, progress, tried), first=config.first)


def after(tools: tuple[str, ...], made: dict[tuple[str, ...], Made], folder: Path, given: Given,
          progress: Progress | None, tried: Tried = lambda path: "") -> Made:  # fmt: skip
    """What optimisers make of a model one after the other, each of what the one before has made.

    `made` has the model after none of them, and gets the rest, so that each goes once for several choices of them.
    """
    if tools not in made:
        before = after(tools[:-1], made, folder, given, progress, tried)
        target = folder / f"{'-'.join(tools)}.onnx"
        made[tools] = _next(tools[-1], made[()].path, before, target, given, progress, tried)
    return made[tools]


def cuda(path: Path, given: Given) -> str | None:
    """Why ONNX Runtime does not run a model on CUDA, or nothing; None where it has no CUDA."""
    from normfuse.bench import make_feeds
    from normfuse.sessions import PROVIDERS, open_session
    from normfuse.cli_env import sessions_have

    if PROVIDERS["cuda"] not in sessions_have():
        return None
    try:
        runtime = open_session(path, "cuda", 0, operators=False)
        runtime.run(None, make_feeds(runtime, path, given))
    except Exception as why:
        return f"it does not run on CUDA: {first_line(why)}"
    return ""


def _next(tool: str, source: Path, before: Made, target: Path, given: Given, progress: Progress | None,
          tried: Tried) -> Made:  # fmt: skip
    """What one more optimiser makes of a model.

    That is kept, as `target`, where ONNX Runtime runs it and its outputs are those of `source` (`compare_rewritten`) on
    what is given, or else on small random inputs, and on longer ones, where sizes are open and it runs with these, and
    nothing is `tried` in vain. What an optimiser prints, and how it ends, is nobody's business but this function's.
    """
    from normfuse.frontends.onnx_model import operators
    from normfuse.frontends.onnx_wide import compare_rewritten

    if progress is not None:
        progress(f"{tool} goes first", 0.0)
    model = files.read_onnx(before.path)[0]
    counts, written, path, runs = operators(model), target.with_suffix(".part"), before.path, None
    why = _attempt(tool, before.path, written, model)
    if not why:
        try:
            found = files.read_onnx(written)[0]
            for some in (given, *_longer(source, given)):
                equal = compare_rewritten(source, written, inputs=some.inputs, sizes=some.sizes)
                if wrong := difference(equal):
                    raise VerificationError(f"its result: {wrong}")
                if some is given:  # longer ones that were drawn may say nothing
                    demand_compared(equal)
            if runs := tried(written):
                raise VerificationError(f"its result: {runs}")
            files.write_new(found, target)
            path, model = target, files.read_onnx(target)[0]
        except NormFuseError as error:
            why = str(error).replace(str(written), "its result")
        finally:
            written.unlink(missing_ok=True)
    number, now = sum(counts.values()), sum(operators(model).values())
    note = f"{tool} {OUT}: {why}" if why else f"{tool} went first: operators {number} -> {now}, outputs equal"
    note += " on the CPU; there is no CUDA here to try it on" if runs is None and not why else ""
    return Made(path, operators=before.operators or counts, notes=[*before.notes, note])


def _longer(source: Path, given: Given) -> list[Given]:
    """Longer inputs for a model that leaves sizes open, if it runs with them; none for others."""
    runtime = session(source)
    if all(isinstance(d, int) or d in given.sizes for i in runtime.get_inputs() for d in i.shape):
        return []
    known = (sizes | dict(given.sizes) for sizes in possible_sizes(files.read_onnx(source)[0]))
    tried = (longest(runtime, LENGTHS, SESSIONS, sizes) for sizes in known)
    return list(islice((Given(feeds) for feeds in tried if feeds is not None), 1))


def _attempt(tool: str, source: Path, target: Path, model: ir.Model) -> str:
    """Let an optimiser write `target`; what went wrong, or nothing."""
    graphs = (model.graph, *model.graph.subgraphs())
    size = sum(v.const_value.nbytes for g in graphs for v in g.initializers.values() if v.const_value is not None)
    if size > LIMIT:
        return f"the model has {size / 2**30:.1f} GiB of weights, and it takes models of less than 2"
    try:
        done = run_module("normfuse.first", tool, str(source), str(target), timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"it took more than {SECONDS:.0f} s"
    if done.returncode < 0:
        return f"it was ended by {signal.Signals(-done.returncode).name}"
    if done.returncode or not target.exists():
        return (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1][:200]
    return ""


def _onnxsim(source: str, target: str) -> None:
    import onnx
    import onnxsim

    onnx.save(onnxsim.simplify(onnx.load(source))[0], target)


def _onnxscript(source: str, target: str) -> None:
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    model = ir.load(source)
    ir.external_data.load_to_model(model)
    ir.save(optimize_for_ort(model)[0], target)


def _child(tool: str, source: str, target: str) -> None:
    """Run one of them, in the process that is its own; the last line of an error is what is told of it."""
    try:
        {"onnxsim": _onnxsim, "onnxscript": _onnxscript}[tool](source, target)
    except Exception as why:
        sys.exit(f"{type(why).__name__}: {first_line(why)}")


if __name__ == "__main__":
    _child(*sys.argv[1:])
