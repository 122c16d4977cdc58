"""The contract of the command line: exit codes, one JSON object on stdout, one line per error, instant help."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import normfuse
import normfuse.ort
from normfuse.cli import main
from normfuse.cli_print import Table, clean, print_blocks
from normfuse.cli_report import report_blocks
from normfuse.errors import InputError, UnsafeModelError, UnsupportedError, VerificationError
from normfuse.report import NormRecord, RefusalRecord, Report
from tests.cli_tools import COMMAND, EVIL, fails, fails_json, norm_model, run, saved


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(norm_model(), tmp_path / "model.onnx")


# -- the main job -------------------------------------------------------------------------------------------------


def test_inspect_shows_norm_and_formula(model: Path) -> None:
    code, out, _ = run("inspect", model)
    assert code == 0
    assert "rms_norm" in out
    assert "(mean(x^2) + 1e-06)^-1/2" in out
    assert "found 1 (1 decomposed, 0 one operator), refused 0" in out


def test_inspect_json_is_the_report(model: Path) -> None:
    code, out, _ = run("inspect", model, "--json")
    data = json.loads(out)
    assert code == 0
    assert data["schema"] == 1
    assert [n["kind"] for n in data["norms"]] == ["rms_norm"]
    assert data["refusals"] == []


def test_rewrite_then_verify(model: Path, tmp_path: Path) -> None:
    out_path = tmp_path / "out.onnx"
    code, out, _ = run("rewrite", model, out_path)
    assert code == 0
    assert "found 1, fused 1, refused 0; operators 6 -> 1; verified 1/1" in out
    onnx.checker.check_model(onnx.load(out_path), full_check=True)
    code, out, _ = run("verify", model, out_path)
    assert code == 0
    assert "equal" in out


def test_rewrite_json(model: Path, tmp_path: Path) -> None:
    code, out, _ = run("rewrite", model, tmp_path / "out.onnx", "--json")
    data = json.loads(out)
    assert code == 0
    assert (data["found"], data["fused"], data["refused"]) == (1, 1, 0)
    assert data["norms"][0]["action"] == "fused"
    assert data["norms"][0]["verified"] is True


def test_dry_run_writes_nothing(model: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    for argv in ([model, tmp_path / "out.onnx", "--dry-run"], [model, "--dry-run"]):
        code, out, _ = run("rewrite", *argv)
        assert code == 0
        assert "fused 1" in out
        assert "nothing was written" in out
    assert sorted(tmp_path.iterdir()) == before


def test_a_dry_run_tells_what_would_keep_the_output_from_being_written(model: Path, tmp_path: Path) -> None:
    there, nowhere = tmp_path / "there.onnx", tmp_path / "none" / "out.onnx"
    there.write_bytes(b"kept")
    for out_path, told in ((there, "exists already; choose another name, or replace it with --overwrite"),
                           (nowhere, "does not exist"), (model, "is the input itself")):  # fmt: skip
        code, out, _ = run("rewrite", model, out_path, "--dry-run")
        assert code == 0 and "fused 1" in out and "nothing was written" in out
        assert "note: this was a dry run; to write the output would end with: " in out and told in out
        data = json.loads(run("rewrite", model, out_path, "--dry-run", "--json")[1])
        assert told in data["summary"]["notes"][-1]
    for more in ([there, "--overwrite"], [model, "--in-place"], []):
        assert "would end with" not in run("rewrite", model, *more, "--dry-run")[1]
    assert there.read_bytes() == b"kept" and sorted(p.name for p in tmp_path.iterdir()) == [model.name, there.name]


def test_quiet_is_one_line(model: Path, tmp_path: Path) -> None:
    assert run("inspect", model, "-q")[1].count("\n") == 1
    assert run("rewrite", model, tmp_path / "out.onnx", "-q")[1].count("\n") == 1


def test_strict(tmp_path: Path) -> None:
    path, out_path = tmp_path / "near.onnx", tmp_path / "out.onnx"
    onnx.save(norm_model(outside=True), path)
    assert run("rewrite", path, out_path)[0] == 0
    for more in (["--overwrite"], ["--dry-run"], ["--dry-run", "--json"]):
        code, out, _ = run("rewrite", path, out_path, "--strict", *more)
        assert code == 1
        assert "NF1" in out
    assert "NF1" in run("inspect", path)[1]


def test_verify_tells_different_models_apart(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    onnx.save(norm_model(eps=0.5), other)
    code, out, _ = run("verify", model, other)
    assert code == 1
    assert "different" in out
    code, out, _ = run("verify", model, other, "--json")
    assert code == 1
    assert json.loads(out)["equal"] is False


def test_verify_takes_inputs(model: Path, tmp_path: Path) -> None:
    good, bad, text, array = (tmp_path / n for n in ("good.npz", "bad.npz", "text.npz", "array.npy"))
    np.savez(good, x=np.ones((2, 5, 64), np.float32))
    np.savez(bad, z=np.ones(3, np.float32))
    np.savez(tmp_path / "pickle.npz", x=np.array([{}], dtype=object))
    np.save(array, np.ones(3))
    text.write_text("not an archive")
    assert run("verify", model, model, "--inputs", good)[0] == 0
    for wrong in (bad, text, array, tmp_path / "pickle.npz", tmp_path / "missing.npz"):
        fails(run("verify", model, model, "--inputs", wrong))


def open_sizes(shape: str, body: str, more: str = "") -> onnx.ModelProto:
    """A model of x of this shape, and of z if there is `more`."""
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 18]> g (float[{shape}] x{more}) => '
                                   f"(float[A] y) <int64[1] s = {{2}}, int64[1] all = {{-1}}, "
                                   f"int64[1] far = {{40}}, int64[1] farther = {{100}}> {{ {body} }}")  # fmt: skip


@pytest.mark.parametrize(("shape", "body", "taken"), [
    ("batch, n", "y = Reshape(x, all)", [4]),
    ("batch, n", "k = Reshape(x, s) y = Reshape(k, all)", [2]),  # one sample only, whatever the file says
    ("batch, 3, n, m", "k = Gather<axis=2>(x, far) y = Reshape(k, all)", [192]),
    ("batch, 3, n, m", "k = Gather<axis=2>(x, farther) y = Reshape(k, all)", [672]),
])  # fmt: skip
def test_verify_finds_sizes_with_which_a_model_runs(tmp_path: Path, shape: str, body: str, taken: list[int]) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(open_sizes(shape, body), path)
    code, out, _ = run("verify", path, path, "--json")
    assert code == 0 and json.loads(out)["outputs"][0]["shape"] == taken


def test_what_is_not_given_has_the_sizes_of_what_is(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(open_sizes("n, m", "k = Add(x, z) y = Reshape(k, all)", ", float[n, m] z"), path)
    np.savez(tmp_path / "x.npz", x=np.ones((3, 5), np.float32))
    code, out, _ = run("verify", path, path, "--inputs", tmp_path / "x.npz", "--json")
    assert code == 0 and json.loads(out)["outputs"][0]["shape"] == [15]


def test_verify_says_so_where_a_model_runs_with_no_sizes(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(open_sizes("n, 3", "k = Reshape(x, s) y = Reshape(k, all)"), path)
    assert "do not run on these inputs" in fails(run("verify", path, path))


# -- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (InputError("bad\nnews"), 2, "InputError"),
        (UnsafeModelError("bad news"), 2, "UnsafeModelError"),
        (UnsupportedError("bad news"), 2, "UnsupportedError"),
        (VerificationError("bad news"), 1, "VerificationError"),
        (PermissionError(13, "bad news", "m.onnx"), 2, "InputError"),
        (ZeroDivisionError("bad news"), 3, "InternalError"),
        (RecursionError("bad news"), 3, "InternalError"),
        (KeyboardInterrupt(), 130, "Interrupted"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, BaseException) else str(v),
)
def test_exit_code_of_each_error(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, kind: str) -> None:
    def boom(*_: object, **__: object) -> Report:
        print("a library that talks")
        raise error

    monkeypatch.setattr(normfuse, "inspect", boom, raising=False)
    result = run("inspect", "m.onnx")
    assert result[:2] == (code, "")
    line = result[2].splitlines()[-1]
    assert "bad news" in line or code == 130
    assert ("internal error" in line) == (code == 3)
    fails_json(run("inspect", "m.onnx", "--json"), kind, code)


def test_verbose_shows_the_traceback_of_an_internal_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(normfuse, "inspect", lambda _: 1 // 0, raising=False)
    assert main(["inspect", "m.onnx", "-v", "--json"]) == 3
    out, err = capsys.readouterr()
    assert "Traceback" in err
    assert json.loads(out)["error"]["kind"] == "InternalError"


# -- the other commands -------------------------------------------------------------------------------------------


def test_explain() -> None:
    code, out, _ = run("explain", "nf101")
    assert code == 0
    assert out.startswith("NF101: ")
    assert "What to do: " in out
    assert "NF101" in run("explain")[1]
    assert set(json.loads(run("explain", "NF101", "--json")[1])) == {
        "schema",
        "code",
        "title",
        "explanation",
        "fix",
    }
    assert json.loads(run("explain", "--json")[1])["codes"][0]["code"] == "NF100"


def test_env() -> None:
    data = json.loads(run("env", "--json")[1])
    assert {"schema", "python", "normfuse", "torch", "onnx", "onnxruntime", "onnxruntime_providers"} <= set(data)
    assert "CPUExecutionProvider" in data["onnxruntime_providers"]
    assert (data["onnxruntime_operators"] is None) == (normfuse.ort.library_path() is None)
    code, out, err = run("env")
    assert code == 0
    assert "onnxscript" in out
    assert err == ""


# -- hostile names, many layers -----------------------------------------------------------------------------------


def test_names_cannot_act_on_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "evil.onnx"
    for outside in (False, True):
        onnx.save(norm_model(EVIL, outside=outside), path)
        for argv in (["inspect", path], ["inspect", path, "-v"], ["rewrite", path, "--dry-run"],
                     ["inspect", path, "--json"]):  # fmt: skip
            _, out, err = run(*argv)
            assert not set("\x1b\x07\u202e\r") & set(out + err)
    assert EVIL in json.loads(run("inspect", path, "--json")[1])["refusals"][0]["node"]


def test_terminal_output_escapes_names_and_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    print_blocks([EVIL, Table(("name", "action"), [(EVIL, "fused")])])
    text = out.getvalue()
    assert text.count(clean(EVIL)) == 2
    assert "[bold]" in clean(EVIL)
    assert "\x1b]" not in text
    assert "\x1b[31m" not in text


def layers(count: int) -> Report:
    """Llama-like: two norms a layer, and a last one."""
    report = Report(format="ONNX", opset=23, rewritten=True, nodes_before=1000, nodes_after=500)
    for i in range(count):
        for name in ("input_layernorm", "post_attention_layernorm"):
            weight, fact = f"model.layers.{i}.{name}.weight", "w*x*(mean(x^2) + 1e-06)^-1/2"
            report.norms.append(
                NormRecord(f"layers.{i}.{name}", "rms_norm", [-1], 64, 1e-6, "float32", weight, None, "pre", fact,
                           "decomposed", "float32", "fused", True)
            )  # fmt: skip
    report.refusals = [RefusalRecord("NF101", "n", "because")]
    return report


def test_equal_norms_share_a_row() -> None:
    report = layers(80)
    table = next(b for b in report_blocks(report, "m", 0.0, False, False) if isinstance(b, Table))
    assert len(table.rows) == 1
    assert table.rows[0][:2] == ("layers.0.input_layernorm ... layers.79.post_attention_layernorm", "x160")
    assert "w*x*(mean(x^2) + 1e-06)^-1/2" in table.rows[0]
    table = next(b for b in report_blocks(report, "m", 0.0, True, False) if isinstance(b, Table))
    assert len(table.rows) == 160


def test_numbers_that_json_lacks_become_null(monkeypatch: pytest.MonkeyPatch) -> None:
    report = layers(1)
    report.norms[0].error_after = float("nan")
    monkeypatch.setattr(normfuse, "rewrite", lambda *_, **__: report, raising=False)
    out = run("rewrite", "a", "b", "--json")[1]
    assert json.loads(out, parse_constant=pytest.fail)["norms"][0]["error_after"] is None


# -- as a process -------------------------------------------------------------------------------------------------


def test_help_is_instant() -> None:
    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True)
        assert "inspect" in done.stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)  # processor time: other jobs of the machine are not ours
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(once() for _ in range(5)) < 0.3


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys, normfuse.cli\n"
        "try: normfuse.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(*{'torch', 'onnx', 'onnx_ir', 'numpy', 'rich', 'onnxruntime'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ""


def test_sympy_waits_until_it_is_needed(tmp_path: Path) -> None:
    """onnx_ir imports it, for sums and products of symbolic sizes."""
    saved(norm_model(), tmp_path / "in.onnx")
    script = (
        "import sys, normfuse.cli\n"
        "code = normfuse.cli.main(['rewrite', sys.argv[1], sys.argv[2], '-q'])\n"
        "print(code, 'onnx_ir' in sys.modules, 'sympy.core' in sys.modules)\n"
        "import onnx_ir\n"
        "print((onnx_ir.SymbolicDim('n + 1') + 1).value, 'sympy.core' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    _, before, after = done.stdout.splitlines()
    assert (before, after) == ("0 True False", "n + 2 True")


def test_a_reader_that_leaves_early_is_no_error() -> None:
    with subprocess.Popen([*COMMAND, "explain"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_output_in_a_narrow_encoding(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    argv = [*COMMAND, "inspect", str(tmp_path / "módèl.onnx")]
    done = subprocess.run(argv, capture_output=True, env=environment, check=False)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
