"""`normfuse inspect`: one model or several, on the terminal, as JSON and as a page."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import normfuse
from normfuse.cli import BAD_INPUT, DONE, SCHEMA, Outcome
from normfuse.cli_print import Block, clean
from normfuse.cli_report import report_blocks
from normfuse.errors import NormFuseError, path_of
from normfuse.html import page
from normfuse.html.gallery_page import Entry, gallery


def inspect_models(args: argparse.Namespace) -> Outcome:
    """Look at each model. Of several, those that cannot be read are told and shown as such, and the code is 2."""
    models, several = [Path(model) for model in args.models], len(args.models) > 1
    if args.report is not None:
        page.check(path_of(args.report, "--report"), models, args.overwrite)
    entries: list[Entry] = []
    data: list[dict[str, Any]] = []
    blocks: list[Block] = []
    for model in args.models:
        started = time.perf_counter()
        try:
            report = normfuse.inspect(model)
        except (NormFuseError, OSError) as why:
            if not several:
                raise
            message = " ".join(str(why).split())
            message = message if model in message else f"{model}: {message}"
            entries.append(Entry(model, None, message))
            data.append({"path": model, "error": {"kind": type(why).__name__, "message": message}})
            if not args.json:
                print(f"normfuse: {clean(message)}", file=sys.stderr)
            continue
        entries.append(Entry(model, report))
        data.append(({"path": model} if several else {}) | report.to_dict())
        blocks += [""] * bool(blocks and not args.quiet)
        made = report_blocks(report, model, time.perf_counter() - started, args.verbose, args.quiet)
        blocks += [f"{model}: {block}" for block in made] if several and args.quiet else made
    if args.report is not None:
        page.write(gallery(entries), Path(args.report), models, args.overwrite)
        if not args.quiet:
            blocks.append(f"wrote {args.report}")
    code = BAD_INPUT if any(entry.report is None for entry in entries) else DONE
    return Outcome(code, {"schema": SCHEMA, "models": data} if several else data[0], blocks)
