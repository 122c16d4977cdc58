"""Output appears whole or not at all: kills, faults, full disks, folders that may not be written."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from normfuse.errors import InputError
from normfuse.io import files
from tests.cli_tools import norm_model
from tests.fuzz.kills import CASES, FAULTS, Faulty, faults, kills, output, prepared, rewrite, state


@pytest.mark.parametrize("name", CASES)
def test_a_fault_at_every_call(name: str) -> None:
    failed = faults(name)
    assert {"open", "write", "fsync"} <= set(failed)
    assert ("replace" in failed) == ("new" not in name)
    assert ("link" in failed) == ("new" in name or "external" in name)
    assert ("copy_file_range" in failed) == ("external" in name)


def test_kill() -> None:
    found = kills(50)
    assert found["new"] + found["old"] + found["absent"] == 50
    assert found["old"] and found["new"] and found["absent"]


def test_a_mixed_pair_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the old way of writing, under a name that stays, the checks above fail."""
    monkeypatch.setattr(files, "_named", lambda target, data: "out.bin")
    with pytest.raises(AssertionError):
        faults("overwrite, external")


@pytest.mark.parametrize("name", ["new", "overwrite, external", "in place, external"])
def test_a_full_disk(name: str) -> None:
    """The system's own limit on a file's size, at every size: writes that are cut short, and then fail."""
    with prepared(name) as (case, folder, before, after):
        names = {p.name for p in folder.iterdir()}
        for limit in (0, 1, 100, 1000, 4096, 2**19, 2**20):
            child = os.fork()
            if child == 0:
                code = 99
                try:
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                    code = rewrite(case)[0]
                finally:
                    os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert code in (0, 2)
            assert state(Path(output(case))) == (before if code else after)
            if code == 0:
                break
            assert {p.name for p in folder.iterdir()} == names
        assert limit > 0


@pytest.mark.parametrize("name", ["new", "in place", "new, external"])
def test_a_folder_that_may_only_be_read(name: str) -> None:
    with prepared(name) as (case, folder, before, _):
        names = {p.name for p in folder.iterdir()}
        for path in folder.iterdir():
            path.chmod(0o644)
        os.chmod(folder, 0o555)
        child = os.fork()
        if child == 0:
            code = 99
            try:
                if os.getuid() == 0:
                    os.setuid(65534)  # to root every folder is writable
                code, said = rewrite(case)
                code = code if len(said.splitlines()) == 1 and "not writable" in said else 98
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
        os.chmod(folder, 0o755)
        assert state(Path(output(case))) == before
        assert {p.name for p in folder.iterdir()} == names


def test_faults_of_a_new_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model from memory whose weights go beside it: each fault leaves the folder as it was."""
    monkeypatch.setattr(files, "INLINE", 0)
    monkeypatch.setattr(files, "SMALL", 16)
    target, n = tmp_path / "out.onnx", 0
    while True:
        n += 1
        model = ir.serde.deserialize_model(norm_model())
        with Faulty(n, FAULTS[n % len(FAULTS)]) as faulty:
            try:
                files.write_new(model, target)
            except (InputError, OSError) as why:
                assert faulty.failed and isinstance(why, InputError), faulty.failed
        if not faulty.failed:
            break
        if target.exists():  # what failed came after
            target.unlink()
            [data] = tmp_path.iterdir()
            data.unlink()
        assert list(tmp_path.iterdir()) == [], faulty.failed
    assert n > 8
    onnx.checker.check_model(target)
    assert len(list(tmp_path.iterdir())) == 2
