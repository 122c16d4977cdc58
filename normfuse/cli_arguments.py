"""What the command line takes, and how its options are called in what is said of them."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NoReturn, get_args

from normfuse.config import Config, LayerNormToRMSNorm, Numerics, Target, Verify
from normfuse.errors import InputError

DESCRIPTION = "Recognise every LayerNorm and RMSNorm in a model, however it is spelled, and fuse it."
EPILOG = ("exit codes: 0 done; 1 refused under --strict, a mismatch, or nothing to reduce; 2 bad input; "
          "3 internal error; 128 + n ended by signal n")  # fmt: skip
OTHERS = ("external_data", "overwrite", "in_place", "trust", "threads", "rounds")
OPTIONS = "|".join([*(f.name for f in fields(Config)), *OTHERS])


def in_options(message: str) -> str:
    """A message in which options are called as they are on the command line: ``--tolerance 0`` for tolerance=0."""
    def option(found: re.Match[str]) -> str:
        if found[2] == "True":
            return f"--{found[1].replace('_', '-')}"
        return f"--{found[1].replace('_', '-')} {found[2] if found[3] is None else shlex.quote(found[3])}"

    return re.sub(rf"(?<![^\s(])({OPTIONS})=('([^']*)'|[-+.\w]+)(?![-+.\w/\\])", option, message)


class _Parser(argparse.ArgumentParser):
    """Raises `InputError` in place of printing usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        from normfuse.cli_env import version

        print(f"normfuse {version('normfuse')}")
        parser.exit()


def parser(commands: Mapping[str, Callable[[argparse.Namespace], Any]]) -> argparse.ArgumentParser:
    """What the command line takes; `commands` are what carries each command out, by name."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on stdout, and nothing else there")
    loudness = common.add_mutually_exclusive_group()
    loudness.add_argument("-q", "--quiet", action="store_true", help="print the result line only")
    loudness.add_argument("-v", "--verbose", action="store_true", help="print every norm, warnings and tracebacks")

    top = _Parser(prog="normfuse", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False)
    top.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    added = top.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        options: dict[str, Any] = {"description": text, "epilog": EPILOG, "parents": [common], "allow_abbrev": False}
        sub = added.add_parser(name, help=text, **options)
        sub.set_defaults(run=commands[name], prog=sub.prog)
        return sub

    inspect = command("inspect", "show every norm of a model: where it sits, and its formula")
    inspect.add_argument("models", metavar="MODEL", nargs="+",
                         help="an ONNX file, or a .pt2 of torch.export.save, only read; of several, a gallery is made")
    _report_argument(inspect)
    inspect.add_argument("--overwrite", action="store_true", help="replace the report if it exists")
    _rewrite_arguments(command("rewrite", "fuse the norms of a model, check each, and write the result"))
    shrink = command("reduce", "make the smallest model whose rewrite still goes wrong, for a bug report")
    shrink.add_argument("model", metavar="MODEL", help="an ONNX file whose rewrite crashes or changes its outputs")
    shrink.add_argument("output", metavar="OUT", help="the file to write")
    _config_arguments(shrink, ("off", "exact"))
    shrink.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    verify = command("verify", "run two models on the same inputs and compare their outputs")
    verify.add_argument("a", metavar="A", help="an ONNX file, or a .pt2 of torch.export.save")
    verify.add_argument("b", metavar="B", help="another, with the same inputs and outputs")
    verify.add_argument("--inputs", metavar="FILE.npz",
                        help="arrays by input name, in place of random ones (of a .pt2: "
                             "in place of the example inputs saved with A)")  # fmt: skip
    verify.add_argument("--size", metavar="NAME=N", action="append", default=[], help="a size that A leaves open (2)")
    verify.add_argument("--trust", action="store_true", help="load .pt2 files, which can run code in them")
    verify.add_argument("--seed", type=int, default=0, help="seed of what is drawn at random (0)")
    _bench_arguments(command("bench", "time a model in ONNX Runtime, or two in turns"))
    explain = command("explain", "tell what a refusal code means and what to do about it")
    explain.add_argument("code", metavar="CODE", nargs="?", help="such as NF101; without it, all are listed")
    command("env", "print the versions of what NormFuse works with, for a bug report")
    return top


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
    add("--target", choices=get_args(Target), default=default.target,
        help="where the result will run (onnx; standard: where no functions are taken)")  # fmt: skip
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
        help="how far an approximated output may be off on inputs held back from calibration, beyond which nothing is "
             "written (0.05)")  # fmt: skip
    add("--external-data", choices=("copy", "reference"), default="copy",
        help="copy weights that lie beside the model, or refer to them where they are (copy)")  # fmt: skip
    add("--trust", action="store_true", help="load a .pt2, which can run code in it: only from people you trust")
    _report_argument(rewrite)
    add("--bench", action="store_true", help="run IN and OUT in turns, too, and report the latency of both")
    add("--size", metavar="NAME=N", action="append", default=[],
        help="a size that IN leaves open, where models are run: --verify model and --bench (2), --first fastest "
             "(1 and 512), and certificates of conversions")  # fmt: skip
    add("--inputs", metavar="FILE.npz",
        help="arrays by input name for these, in place of random ones (certificates: where those do not do)")
    add("--dry-run", action="store_true", help="do everything but write OUT")
    add("--strict", action="store_true", help="exit with 1 if anything was refused; the output is written all the same")
    add("--overwrite", action="store_true", help="replace OUT, and the report, if they exist")
    add("--in-place", action="store_true", help="allow OUT to be IN; OUT may be left out")
