"""Random graphs on trial, and the trial itself: a recogniser that was broken on purpose is caught within few seeds."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from normfuse.facts import Refused
from normfuse.transfer import RULES
from tests.fuzz import check, onnx_eval, runner, to_fx, to_onnx
from tests.fuzz.claims import wrong
from tests.fuzz.generator import generate
from tests.fuzz.misses import MISSES
from tests.fuzz.program import evaluate
from tests.fuzz.save import save

SEEDS = range(300)


@pytest.mark.fuzz
@pytest.mark.parametrize("count", [60, pytest.param(5000, marks=pytest.mark.slow)])
def test_random_graphs(count: int) -> None:
    tally = runner.run(count, seed=0, jobs=2)
    lines = [f"seed {f['seed']}: {f['front']}: {f['kind']}: {f['message']}" for f in tally.failures]
    assert not lines, "python -m tests.fuzz graphs --replay SEED shows one:\n" + "\n".join(lines)
    assert tally.graphs == count and tally.found == tally.norms > 1.5 * count
    assert tally.with_miss > 0.4 * count and tally.blocks_twice >= count // 500
    assert tally.runs["onnx"] == count and tally.runs["fx"] > 0.3 * count and tally.runs["runtime"] > 0.01 * count


def test_a_graph_that_never_ends_is_a_failure() -> None:
    def judge(seed: int) -> check.Verdict:
        while True:
            with contextlib.suppress(Exception):
                pass

    assert runner.limited(judge, 7, 0.2).failures == [("all", "hang", "not done within 0.2 s")]
    assert runner.limited(check.Verdict, 7).seed == 7


def caught(only: str = "onnx") -> Iterator[str]:
    """The kinds of failure that the first seeds meet, until the test has seen enough."""
    for seed in SEEDS:
        for _, kind, _ in check.judge(seed, only).failures:
            yield kind


def _rule(name: str, rule: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setitem(RULES, name, rule)


def _under(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("normfuse.norm._under", lambda under: ("rms_norm", 0.01))


def _refused(node: Any, facts: list[Any]) -> Any:
    raise Refused("NF106", "broken on purpose")


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "every statistic is taken for a mean square": (_under, "phantom"),
    "every coefficient is near enough": (lambda patch: patch.setattr("normfuse.norm.NEAR", 10.0), "different"),
    "a sign is lost": (_rule("neg", RULES["identity"]), "different"),
    "a term is dropped": (_rule("sub", lambda node, facts: RULES["identity"](node, facts)), "different"),
    "|x| is x": (_rule("abs", RULES["identity"]), "different"),
    "a clamp does nothing": (_rule("max", RULES["identity"]), "different"),
    "a sum is a mean": (_rule("sum", RULES["mean"]), "different"),
    "a square root is not known": (_rule("sqrt", _refused), "missed"),
    "powers crash": (_rule("pow", lambda node, facts: 1 / 0), "crash"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("front", ["onnx", "fx"])
def test_a_broken_recogniser_is_caught(fault: str, front: str, monkeypatch: pytest.MonkeyPatch) -> None:
    breaking, kind = FAULTS[fault]
    breaking(monkeypatch)
    monkeypatch.setattr(check, "SITES_SHARE", 0.0)
    assert kind in caught(front)


def test_verification_that_has_to_save_the_recogniser_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normfuse.norm.NEAR", 10.0)
    monkeypatch.setattr(check, "SITES_SHARE", 1.0)
    assert "NF201" in caught()


def test_another_eps_in_the_result_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from normfuse.frontends.onnx_emit import Emitter

    real = Emitter.emit

    def emit(self: Emitter, norm: Any, *args: Any, **more: Any) -> Any:
        from dataclasses import replace

        return real(self, replace(norm, eps=norm.eps * 1.001), *args, **more)

    monkeypatch.setattr(check, "SITES_SHARE", 0.0)
    monkeypatch.setattr(Emitter, "emit", emit)
    assert "different" in caught()


def test_every_near_miss_is_drawn_and_graphs_are_the_same_twice() -> None:
    programs = [generate(seed) for seed in range(800)]
    assert {name for program in programs for name in program.misses} == set(MISSES)
    assert [str(program) for program in programs] == [str(generate(seed)) for seed in range(800)]
    assert sum(bool(program.misses) for program in programs) > 0.4 * 800


@pytest.mark.parametrize("seeds", [range(k, 150, 3) for k in range(3)])
def test_both_ways_of_writing_a_program_mean_what_it_says(seeds: range) -> None:
    """So that a failure is one of the rewrite, and not of the trial."""
    for seed in seeds:
        program = generate(seed)
        model, module = to_onnx.write(program), to_fx.write(program)
        onnx.checker.check_model(model, full_check=True)
        for _, given in check.feeds(program):
            named = {v.name: given[v.index] for v in program.inputs}
            for flat, results in ((False, onnx_eval.Model(model).run(named)), (True, to_fx.run(module, named))):
                wanted = evaluate(program, given, flat)
                spread = check.spread(program, given, wanted, flat, check.DOUBLE, 0.0)
                for want, got, by_chance in zip(wanted, results, spread, strict=True):
                    bound = 1e-12 * check.top(want) + check.MARGIN * by_chance
                    assert check.distance(want, np.asarray(got)) <= bound, seed


def test_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "sum.json"
    command = [sys.executable, "-m", "tests.fuzz", "graphs", "--seed", "7"]
    done = subprocess.run([*command, "--count", "8", "--json", str(out), "--save", str(tmp_path / "failed")],
                          capture_output=True, text=True, check=True)  # fmt: skip
    data = json.loads(out.read_text())["graphs"]
    assert data["graphs"] == 8 and data["failures"] == [] and data["blocks_twice"] == 1
    assert "true norms found" in done.stdout and not (tmp_path / "failed").exists()
    done = subprocess.run([*command, "--replay", "7"], capture_output=True, text=True)
    assert done.returncode == 0 and "seed 7" in done.stdout and "nothing failed" in done.stdout


def test_what_fails_is_saved_and_reduced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normfuse.norm.NEAR", 10.0)
    monkeypatch.setattr(check, "SITES_SHARE", 1.0)
    seed = next(s for s in SEEDS if any(kind == "NF201" for _, kind, _ in check.judge(s, "onnx").failures))
    assert "rolled back" in save(seed, tmp_path)
    before, after = (onnx.load(tmp_path / f"{seed}{suffix}.onnx") for suffix in ("", ".reduced"))
    assert len(after.graph.node) <= len(before.graph.node) and (tmp_path / f"{seed}.txt").read_text()


def test_two_near_misses_may_make_a_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """(x + mean(x)) / s with its mean taken away: found, and not held against the recogniser."""
    monkeypatch.setattr("tests.fuzz.program.LATER", 0.0)
    program, eps = generate(300019879), 3.2603728e-06
    assert not check.judge(program.seed, "onnx").failures
    assert check.emerges(program, "layer_norm", (-1,), eps)
    for kind, axes, other in (("rms_norm", (-1,), 2 * eps), ("layer_norm", (-2,), eps), ("layer_norm", (-1,), 2 * eps)):
        assert not check.emerges(program, kind, axes, other)


@pytest.mark.parametrize("seeds", [range(40), (42, 389, 587, 1009, 1659)])
def test_what_is_claimed_of_shapes_is_true(seeds: Sequence[int]) -> None:
    assert not [(seed, line) for seed in seeds for line in wrong(seed)]


def test_a_claim_that_is_not_true_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normfuse.frontends.onnx_values.rank_of", lambda node, rank, arrays: 1)
    assert any("has shape" in line for line in wrong(42))
