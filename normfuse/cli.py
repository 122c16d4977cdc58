"""The command line: `normfuse inspect|rewrite|reduce|verify|bench|explain|env`.

Exit codes: 0 done; 1 refused under --strict, a mismatch, or nothing to reduce; 2 bad input, or models that cannot be
compared; 3 internal error; 128 + n ended by signal n. With --json exactly one JSON object goes to stdout, errors too.
Heavy imports stand inside functions, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfuse.cli_arguments import in_options, parser
from normfuse.cli_process import Ended, ending, quiet, waiting
from normfuse.config import FASTEST, Config
from normfuse.errors import InputError, NormFuseError, VerificationError, first_line, path_of
from normfuse.process import demand_going

if TYPE_CHECKING:
    from normfuse.bench import How
    from normfuse.cli_print import Block
    from normfuse.html.rewrite_page import Before
    from normfuse.report import Report

DONE, DIFFERENT, BAD_INPUT, INTERNAL, INTERRUPTED = 0, 1, 2, 3, 130
SCHEMA = 1


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
        args, more = parser(COMMANDS).parse_known_args(argv)
        if more:
            early = "" if more[0] != argv[0] else "options stand behind the command; "
            raise InputError(f"unrecognized arguments: {' '.join(more)}; {early}see `{args.prog} --help`")
        args.typed = argv
        with ending(), quiet(args.verbose), waiting():
            outcome = args.run(args)
            demand_going()
        _emit(outcome, as_json)
        return int(outcome.code)
    except Ended as why:
        return _fail(128 + why.number, "Interrupted", f"ended by {why.number.name}", as_json)
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, "Interrupted", "interrupted", as_json)
    except VerificationError as why:
        return _fail(DIFFERENT, "VerificationError", str(why), as_json)
    except NormFuseError as why:
        return _fail(BAD_INPUT, type(why).__name__, in_options(str(why)), as_json)
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
    before = _before(args, output) if args.report is not None else None
    how = _running(args, config, output)
    started = time.perf_counter()
    with progress(not args.quiet) as advance:
        report: Report = normfuse.rewrite(
            args.model, output, config,
            dry_run=args.dry_run, overwrite=args.overwrite, in_place=in_place, external_data=args.external_data,
            calibration=args.calibration, progress=advance, trust=args.trust,
            how=how if args.first == FASTEST or (config.runs and (args.size or args.inputs is not None)) else None,
        )  # fmt: skip
    seconds = time.perf_counter() - started
    if how is not None and args.bench:
        _time(report, how, args.quiet)
    report.notes = [in_options(note) for note in report.notes]
    blocks = report_blocks(report, args.model, seconds, args.verbose, args.quiet)
    if not args.quiet:
        blocks.append("dry run: no model was written" if args.dry_run and args.report is not None else
                      "dry run: nothing was written" if args.dry_run else f"wrote {output}")
    if before is not None:
        from normfuse.html import page, rewrite_page

        made = rewrite_page.page(report, before, shlex.join(["normfuse", *args.typed]))
        try:
            page.write(made, Path(args.report), [Path(args.model), Path(output)], args.overwrite)
        except NormFuseError as why:
            raise type(why)(f"{why}; {output} was written" if not args.dry_run else str(why)) from why
        if not args.quiet:
            blocks.append(f"wrote {args.report}")
    return Outcome(DIFFERENT if args.strict and report.refusals else DONE, report.to_dict(), blocks)


def _running(args: argparse.Namespace, config: Config, output: str) -> How | None:
    """How to run models. Raises `InputError` where that cannot be, before anything is done."""
    given = "--size" if args.size else "--inputs" if args.inputs is not None else ""
    if not args.bench and args.first != FASTEST:
        if given and not config.runs:
            raise InputError(f"{given} is to run models with, and none is run: it takes --verify model, "
                             "--layernorm-to-rmsnorm, --bench or --first")  # fmt: skip
        if not given:
            return None
    from normfuse import bench, cli_bench
    from normfuse.frontends.onnx_open import demand_given
    from normfuse.io.files import read_onnx

    if args.bench and (args.dry_run or os.path.realpath(args.model) == os.path.realpath(output)):
        raise InputError("--bench runs IN and OUT in turns; leave --dry-run and --in-place out")
    bench.check(args.model)
    how = bench.How(sizes=cli_bench.sizes(args.size), inputs=args.inputs)
    demand_given(read_onnx(args.model)[0], how.given())
    return how


def _time(report: Report, how: How, quiet: bool) -> None:
    """Put the latency into the report; OUT is written by now, so that what goes wrong is a note."""
    from normfuse import cli_bench

    try:
        report.latency = cli_bench.measure([report.source, report.target], how, quiet)
    except NormFuseError as why:
        report.notes.append(f"the latency was not measured: {why}")
    except Exception as why:
        report.notes.append(f"the latency was not measured: {type(why).__name__}: {first_line(why)}")


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

    page.check(path_of(args.report, "--report"), [Path(args.model), Path(output)], args.overwrite)
    return rewrite_page.prepare(args.model)


def _verify(args: argparse.Namespace) -> Outcome:
    from normfuse.cli_report import comparison_blocks

    from normfuse.calibrate import load

    from normfuse.io.pt2 import foreign, is_zip

    from normfuse.verify import demand_compared

    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed {args.seed}: give a number from 0 to 2^63 - 1")
    for path in (args.a, args.b):
        if not path_of(path, "a model").exists():  # that, and not of another kind
            raise InputError(f"{path}: no such file")
        if (other := foreign(path)) is not None:
            raise InputError(f"{path}: {other}")
    inputs = load(path_of(args.inputs, "--inputs")) if args.inputs is not None else None
    programs = [is_zip(path) for path in (args.a, args.b)]
    if all(programs):
        from normfuse.frontends import pt2_run

        if args.size:
            raise InputError("--size is for ONNX models; a .pt2 is run on the inputs saved with it, or on --inputs")
        result = pt2_run.compare_files(Path(args.a), Path(args.b), trust=args.trust, seed=args.seed, inputs=inputs)
    elif any(programs):
        zipped, plain = (args.a, args.b) if programs[0] else (args.b, args.a)
        raise InputError(f"{zipped} is a .pt2 or another zip archive, and {plain} is none; give two of a kind")
    else:
        from normfuse.cli_bench import sizes
        from normfuse.frontends.onnx_wide import compare_rewritten

        result = compare_rewritten(args.a, args.b, seed=args.seed, inputs=inputs, sizes=sizes(args.size))
    demand_compared(result)
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


COMMANDS = {"inspect": _inspect, "rewrite": _rewrite, "reduce": _reduce, "verify": _verify, "bench": _bench,
            "explain": _explain, "env": _env}  # fmt: skip


# -- printing -----------------------------------------------------------------------------------------------------


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
