"""The command line: `normfuse inspect|rewrite|reduce|verify|bench|explain|env`.

Exit codes: 0 done; 1 refused under --strict, or a mismatch; 2 bad input; 3 internal error. With --json exactly one
JSON object goes to stdout, errors too. Heavy imports stand inside functions, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from normfuse.config import FASTEST, Config, LayerNormToRMSNorm, Numerics, Target, Verify
from normfuse.errors import InputError, NormFuseError, VerificationError

if TYPE_CHECKING:
    from normfuse.bench import How
    from normfuse.cli_print import Block
    from normfuse.html.rewrite_page import Before
    from normfuse.report import Report

DONE, DIFFERENT, BAD_INPUT, INTERNAL, INTERRUPTED = 0, 1, 2, 3, 130
SCHEMA = 1

DESCRIPTION = "Recognise every LayerNorm and RMSNorm in a model, however it is spelled, and fuse it."
EPILOG = "exit codes: 0 done; 1 refused under --strict, or a mismatch; 2 bad input; 3 internal error"


@dataclass(slots=True)
class Outcome:
    """What a command gives back: an exit code, the object for --json, and the same for people."""

    code: int
    data: dict[str, Any]
    blocks: list[Block] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; nothing but `SystemExit` from --help leaves here."""
    argv = sys.argv[1:] if argv is None else list(argv)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as cron and daemons do
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    as_json, verbose = "--json" in argv, "-v" in argv or "--verbose" in argv
    try:
        args, more = _parser().parse_known_args(argv)
        if more:
            raise InputError(f"unrecognized arguments: {' '.join(more)}; see `{args.prog} --help`")
        args.typed = argv
        with _ending(), _quiet(args.verbose):
            outcome = args.run(args)
        _emit(outcome, as_json)
        return int(outcome.code)
    except Ended as why:
        return _fail(128 + why.number, "Interrupted", f"ended by {why.number.name}", as_json)
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, "Interrupted", "interrupted", as_json)
    except VerificationError as why:
        return _fail(DIFFERENT, "VerificationError", str(why), as_json)
    except NormFuseError as why:
        return _fail(BAD_INPUT, type(why).__name__, str(why), as_json)
    except BrokenPipeError:
        return DONE
    except OSError as why:
        where = f": {why.filename}" if why.filename else ""
        return _fail(BAD_INPUT, "InputError", f"{why.strerror or why}{where}", as_json)
    except Exception as why:
        if verbose:
            import traceback

            traceback.print_exc()
        hint = "" if verbose else " (run with -v for the traceback)"
        return _fail(INTERNAL, "InternalError", f"internal error: {type(why).__name__}: {why}{hint}", as_json)


# -- commands -----------------------------------------------------------------------------------------------------


def _inspect(args: argparse.Namespace) -> Outcome:
    from normfuse.cli_inspect import inspect_models

    return inspect_models(args)


def _rewrite(args: argparse.Namespace) -> Outcome:
    import normfuse
    from normfuse.cli_print import progress
    from normfuse.cli_report import report_blocks

    if not args.output and not (args.output is None and (args.in_place or args.dry_run)):
        raise InputError("no output is given; name a file to write, or use --in-place or --dry-run")
    output, in_place = args.output or args.model, args.in_place or args.output is None
    config = replace(_config(args), norms=args.norms, tolerance=args.tolerance, first=args.first)
    before = _before(args, output) if args.report else None
    how = _timing(args, output)
    started = time.perf_counter()
    with progress(not args.quiet) as advance:
        report: Report = normfuse.rewrite(
            args.model, output, config,
            dry_run=args.dry_run, overwrite=args.overwrite, in_place=in_place, external_data=args.external_data,
            calibration=args.calibration, progress=advance, trust=args.trust,
            how=how if args.first == FASTEST else None,
        )  # fmt: skip
    seconds = time.perf_counter() - started
    if how is not None and args.bench:
        _time(report, how, args.quiet)
    blocks = report_blocks(report, args.model, seconds, args.verbose, args.quiet)
    if not args.quiet:
        blocks.append("dry run: nothing was written" if args.dry_run else f"wrote {output}")
    if before is not None:
        from normfuse.html import page, rewrite_page

        made = rewrite_page.page(report, before, shlex.join(["normfuse", *args.typed]))
        page.write(made, Path(args.report), [Path(args.model), Path(output)], args.overwrite)
        if not args.quiet:
            blocks.append(f"wrote {args.report}")
    return Outcome(DIFFERENT if args.strict and report.refusals else DONE, report.to_dict(), blocks)


def _timing(args: argparse.Namespace, output: str) -> How | None:
    """How to time models. Raises `InputError` where that cannot be, before anything is done."""
    if not args.bench and args.first != FASTEST:
        if args.size:
            raise InputError("--size is a size to run the models with; it takes --bench or --first fastest")
        return None
    from normfuse import bench, cli_bench

    if args.bench and (args.dry_run or os.path.realpath(args.model) == os.path.realpath(output)):
        raise InputError("--bench runs IN and OUT in turns; leave --dry-run and --in-place out")
    bench.check(args.model)
    return bench.How(sizes=cli_bench.sizes(args.size))


def _time(report: Report, how: How, quiet: bool) -> None:
    """Put the latency into the report; OUT is written by now, so that what goes wrong is a note."""
    from normfuse import cli_bench

    try:
        report.latency = cli_bench.measure([report.source, report.target], how, quiet)
    except NormFuseError as why:
        report.notes.append(f"the latency was not measured: {why}")


def _config(args: argparse.Namespace) -> Config:
    return Config(args.layernorm_to_rmsnorm, args.numerics, args.target, args.verify, args.ort_version, args.untie,
                  args.fold_scale, args.force)  # fmt: skip


def _reduce(args: argparse.Namespace) -> Outcome:
    from normfuse.cli_print import progress
    from normfuse.reduce import reduce

    with progress(not args.quiet) as advance:
        found = reduce(args.model, args.output, _config(args), overwrite=args.overwrite, progress=advance)
    if found is None:
        data = {"schema": SCHEMA, "failure": None}
        return Outcome(DIFFERENT, data, [f"{args.model}: nothing goes wrong with these options; nothing was written"])
    lines: list[Block] = [f"{found.failure}: {found.message}"]
    if args.verbose:
        lines += [f"norms left: {', '.join(found.norms) or 'none'}", f"{found.tries} models tried"]
    lines.append(f"nodes {found.nodes_before} -> {found.nodes_after}; wrote {args.output}")
    return Outcome(DONE, {"schema": SCHEMA} | found.to_dict(), lines[-1:] if args.quiet else lines)


def _before(args: argparse.Namespace, output: str) -> Before:
    """What the report on a rewrite tells of the input, which may not be there any more afterwards."""
    from normfuse.html import page, rewrite_page

    page.check(Path(args.report), [Path(args.model), Path(output)], args.overwrite)
    return rewrite_page.prepare(args.model)


def _verify(args: argparse.Namespace) -> Outcome:
    from normfuse.cli_report import comparison_blocks

    from normfuse.calibrate import load

    from normfuse.io.pt2 import foreign, is_zip

    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed {args.seed}: give a number from 0 to 2^63 - 1")
    for path in (args.a, args.b):
        Path(path).stat()  # a file that is missing is that, and not of another kind
        if (other := foreign(path)) is not None:
            raise InputError(f"{path}: {other}")
    inputs = load(args.inputs) if args.inputs else None
    programs = [is_zip(path) for path in (args.a, args.b)]
    if all(programs):
        from normfuse.frontends import pt2_run

        result = pt2_run.compare_files(Path(args.a), Path(args.b), trust=args.trust, seed=args.seed, inputs=inputs)
    elif any(programs):
        zipped, plain = (args.a, args.b) if programs[0] else (args.b, args.a)
        raise InputError(f"{zipped} is a .pt2 or another zip archive, and {plain} is none; give two of a kind")
    else:
        from normfuse.frontends.onnx_wide import compare_rewritten

        result = compare_rewritten(args.a, args.b, seed=args.seed, inputs=inputs)
    code = DONE if result["equal"] else DIFFERENT
    return Outcome(code, {"schema": SCHEMA} | result, comparison_blocks(result, args.quiet))


def _bench(args: argparse.Namespace) -> Outcome:
    from normfuse.cli_bench import bench_models

    return bench_models(args)


def _explain(args: argparse.Namespace) -> Outcome:
    from normfuse.cli_print import Table
    from normfuse.codes import CODES

    if args.code is None:
        data = [{"code": code} | _code_dict(code) for code in CODES]
        table = Table(("code", "meaning"), [(code, entry.title) for code, entry in CODES.items()])
        return Outcome(DONE, {"schema": SCHEMA, "codes": data}, [table])
    code = args.code.upper()
    if code not in CODES:
        raise InputError(f"there is no code {args.code!r}; `normfuse explain` lists all")
    entry = CODES[code]
    lines = [f"{code}: {entry.title}", "", *_wrap(entry.text), "", *_wrap(f"What to do: {entry.fix}")]
    blocks: list[Block] = [*lines]
    return Outcome(DONE, {"schema": SCHEMA, "code": code} | _code_dict(code), blocks)


def _wrap(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, 88)


def _code_dict(code: str) -> dict[str, str]:
    from normfuse.codes import CODES

    title, text, fix = CODES[code]
    return {"title": title, "explanation": text, "fix": fix}


def _env(args: argparse.Namespace) -> Outcome:
    from normfuse.cli_env import environment
    from normfuse.cli_print import Table

    found = environment()
    rows = [(name, ", ".join(value) if isinstance(value, list) else value or "-") for name, value in found.items()]
    return Outcome(DONE, {"schema": SCHEMA} | found, [Table(("what", "version"), rows)])


# -- arguments ----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Raises `InputError` in place of printing usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        from normfuse.cli_env import version

        print(f"normfuse {version('normfuse')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on stdout, and nothing else there")
    loudness = common.add_mutually_exclusive_group()
    loudness.add_argument("-q", "--quiet", action="store_true", help="print the result line only")
    loudness.add_argument("-v", "--verbose", action="store_true", help="print every norm, warnings and tracebacks")

    parser = _Parser(prog="normfuse", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, run: Callable[[argparse.Namespace], Outcome], text: str) -> argparse.ArgumentParser:
        options: dict[str, Any] = {"description": text, "epilog": EPILOG, "parents": [common], "allow_abbrev": False}
        sub = commands.add_parser(name, help=text, **options)
        sub.set_defaults(run=run, prog=sub.prog)
        return sub

    inspect = command("inspect", _inspect, "show every norm of a model: where it sits, and its formula")
    inspect.add_argument("models", metavar="MODEL", nargs="+",
                         help="an ONNX file, or a .pt2 of torch.export.save, only read; of several, a gallery is made")
    _report_argument(inspect)
    inspect.add_argument("--overwrite", action="store_true", help="replace the report if it exists")
    _rewrite_arguments(command("rewrite", _rewrite, "fuse the norms of a model, check each, and write the result"))
    shrink = command("reduce", _reduce, "make the smallest model whose rewrite still goes wrong, for a bug report")
    shrink.add_argument("model", metavar="MODEL", help="an ONNX file whose rewrite crashes or changes its outputs")
    shrink.add_argument("output", metavar="OUT", help="the file to write")
    _config_arguments(shrink, ("off", "exact"))
    shrink.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    verify = command("verify", _verify, "run two models on the same inputs and compare their outputs")
    verify.add_argument("a", metavar="A", help="an ONNX file, or a .pt2 of torch.export.save")
    verify.add_argument("b", metavar="B", help="another, with the same inputs and outputs")
    verify.add_argument("--inputs", metavar="FILE.npz",
                        help="arrays by input name, in place of random ones (of a .pt2: "
                             "in place of the example inputs saved with A)")  # fmt: skip
    verify.add_argument("--trust", action="store_true", help="load .pt2 files, which can run code in them")
    verify.add_argument("--seed", type=int, default=0, help="seed of what is drawn at random (0)")
    _bench_arguments(command("bench", _bench, "time a model in ONNX Runtime, or two in turns"))
    explain = command("explain", _explain, "tell what a refusal code means and what to do about it")
    explain.add_argument("code", metavar="CODE", nargs="?", help="such as NF101; without it, all are listed")
    command("env", _env, "print the versions of what NormFuse works with, for a bug report")
    return parser


def _bench_arguments(bench: argparse.ArgumentParser) -> None:
    """The options of `bench`."""
    add = bench.add_argument
    add("a", metavar="A", help="an ONNX file")
    add("b", metavar="B", nargs="?", help="another with the same inputs: both run in turns")
    add("--size", metavar="NAME=N", action="append", default=[], help="a size that the model leaves open (2)")
    add("--inputs", metavar="FILE.npz", help="arrays by input name, in place of random ones")
    add("--threads", type=int, default=0, metavar="N", help="threads of an operator (what ONNX Runtime takes)")
    add("--rounds", type=int, metavar="N", help="rounds to measure, 3 or more (as many as take 5 seconds, at least 11)")
    add("--no-library", action="store_true", help="run the functions of a --target normfuse model by their bodies")
    _report_argument(bench)
    add("--overwrite", action="store_true", help="replace the report if it exists")


def _report_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument("--report", metavar="FILE.html", help="write a page to look at in a browser, too")


def _config_arguments(parser: argparse.ArgumentParser, modes: Sequence[str]) -> None:
    """The options of a rewrite; their names and choices are those of `Config`."""
    default, add = Config(), parser.add_argument
    add("--layernorm-to-rmsnorm", choices=modes, default=default.layernorm_to_rmsnorm,
        help="turn LayerNorm into RMSNorm by editing the weights ahead of it (off)")  # fmt: skip
    add("--untie", action="store_true", help="copy a weight to be edited that something else reads too")
    add("--force", action="store_true", help="convert LayerNorms also where nothing is gained on the target")
    add("--fold-scale", action="store_true", help="multiply the weight of each RMSNorm into the layers behind it")
    add("--target", choices=get_args(Target), default=default.target, help="where the result will run (onnx: anywhere)")
    add("--ort-version", default=default.ort_version, metavar="X.Y",
        help="the ONNX Runtime of targets ort-cpu and ort-cuda (the one installed)")  # fmt: skip
    add("--numerics", choices=get_args(Numerics), default=default.numerics,
        help="exact keeps every rounding of the model; fast may compute in float32 instead (exact)")  # fmt: skip
    add("--verify", choices=get_args(Verify), default=default.verify,
        help="check each replaced region, or the whole model as well, or nothing (sites)")  # fmt: skip


def _rewrite_arguments(rewrite: argparse.ArgumentParser) -> None:
    """The options of `rewrite`."""
    default, add = Config(), rewrite.add_argument
    add("model", metavar="IN", help="an ONNX file, or a .pt2 of torch.export.save")
    add("output", metavar="OUT", nargs="?", help="the file to write, of the kind of IN")
    _config_arguments(rewrite, get_args(LayerNormToRMSNorm))
    add("--first", default=default.first, metavar="TOOLS",
        help="optimisers that have the model before, with commas: onnxscript, onnxsim; kept where outputs stay equal; "
             "or fastest: those of them, or none, with which it is measured to be fastest")  # fmt: skip
    add("--calibration", metavar="PATH", help="inputs for approximate: an .npz file, or a folder of them")
    add("--norms", metavar="PATTERNS", default=default.norms, help="which norms to approximate, by name (all)")
    add("--tolerance", type=float, default=default.tolerance, metavar="X",
        help="how far an approximated output may be off on inputs held back from calibration (0.05)")  # fmt: skip
    add("--external-data", choices=("copy", "reference"), default="copy",
        help="copy weights that lie beside the model, or refer to them where they are (copy)")  # fmt: skip
    add("--trust", action="store_true", help="load a .pt2, which can run code in it: only from people you trust")
    _report_argument(rewrite)
    add("--bench", action="store_true", help="run IN and OUT in turns, too, and report the latency of both")
    add("--size", metavar="NAME=N", action="append", default=[],
        help="a size that IN leaves open, for --bench (2) and --first fastest (1 and 512)")
    add("--dry-run", action="store_true", help="do everything but write OUT")
    add("--strict", action="store_true", help="exit with 1 if anything was refused; the output is written all the same")
    add("--overwrite", action="store_true", help="replace OUT, and the report, if they exist")
    add("--in-place", action="store_true", help="allow OUT to be IN; OUT may be left out")


# -- signals ------------------------------------------------------------------------------------------------------


class Ended(KeyboardInterrupt):
    """A signal that asks the process to end, which it does as at Ctrl-C: with nothing half done."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__()
        self.number = number


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """Clean up before a signal ends the process, unless whoever started it has settled what is to happen."""
    def end(number: int, _: object) -> NoReturn:
        raise Ended(signal.Signals(number))

    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, end) for number in numbers if signal.getsignal(number) is signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- printing -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    """Keep what libraries print away from stdout, and their warnings away altogether unless asked for."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        if not verbose:
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)


def _emit(outcome: Outcome, as_json: bool) -> None:
    from normfuse.cli_print import print_blocks, print_json

    if as_json:
        print_json(outcome.data)
    else:
        print_blocks(outcome.blocks)


def _fail(code: int, kind: str, message: str, as_json: bool) -> int:
    """Report an error in one line, and give back the exit code."""
    from normfuse.cli_print import clean, print_json

    message = re.sub(r"\s*\n\s*", " ", message.strip())
    try:
        if as_json:
            print_json({"schema": SCHEMA, "error": {"kind": kind, "message": message}})
        else:
            print(f"normfuse: {clean(message)}", file=sys.stderr)
    except OSError:  # there is no one to tell: the disk is full, say
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), (sys.stdout if as_json else sys.stderr).fileno())
    return code
