"""A sample of the mutants of the algebra is killed, the runner can tell, and its list of exceptions is current.

The whole run is `python -m tests.mutation`.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from tests.mutation.__main__ import EXPLAINED, explained, stale
from tests.mutation.mutants import ROOT, Source

ALGEBRA = ("facts.py", "transfer.py", "norm.py")


def test_a_mutant_changes_one_place_and_no_message() -> None:
    source = Source(ROOT / "normfuse" / "facts.py")
    mutants = list(source.mutants())
    assert len(mutants) > 400 and len({(m.line, m.key) for m in mutants}) > 400
    assert not any("Refused(" in m.before and "raise" not in m.before for m in mutants)
    (drop,) = [m for m in mutants if m.function == "power" and m.text == "if not p:" and m.after == "if False"]
    before = ast.unparse(source.tree).splitlines()
    drop.apply()
    after = ast.unparse(source.tree).splitlines()
    assert [(a, b) for a, b in zip(before, after, strict=True) if a != b] == [("    if not p:", "    if False:")]


def test_the_list_of_explained_mutants_is_current() -> None:
    assert not stale(explained())
    assert EXPLAINED.exists()


def test_a_sample_is_killed(tmp_path: Path) -> None:
    """In a process of its own: it forks, and changes the core."""
    command = [sys.executable, "-m", "tests.mutation", "--sample", "60", "--seed", "3",
               "--tests", "test_facts,test_layouts,test_transfer,test_norm,test_recognise",
               "--json", str(tmp_path / "found.json")]  # fmt: skip
    for file in ALGEBRA:
        command += ["--file", file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    command += ["--tests", "test_codes", "--share", "0.01"]  # without the tests of the core nothing is killed
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300).returncode == 1
