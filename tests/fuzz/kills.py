"""Writing that is broken off: kill -9 at random moments, and a fault at every call that writes.

Whatever happens, what stands under the output's name is the old model or the new one, whole and with its own weights,
or nothing.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from normfuse.cli import main
from tests.cli_tools import norm_model

WIDTH = 2**18
"""Elements of the weights that lie beside the model."""


@dataclass(frozen=True)
class Case:
    """A way of writing: the arguments after `rewrite`, whether weights lie beside the model, what was there before."""

    arguments: tuple[str, ...]
    external: bool
    old: bool


CASES = {
    "new": Case(("in.onnx", "out.onnx"), False, False),
    "overwrite": Case(("in.onnx", "out.onnx", "--overwrite"), False, True),
    "new, external": Case(("in.onnx", "out.onnx"), True, False),
    "overwrite, external": Case(("in.onnx", "out.onnx", "--overwrite"), True, True),
    "reference": Case(("in.onnx", "out.onnx", "--overwrite", "--external-data", "reference"), True, True),
    "in place": Case(("in.onnx", "--in-place"), False, False),
    "in place, external": Case(("in.onnx", "--in-place"), True, False),
}


def build(case: Case, folder: Path) -> None:
    """The input, and where the case says so an older output with other weights."""
    for name, value in (("in", 2.0), *([("out", 1.0)] if case.old else [])):
        model = norm_model()
        bulk = np.full(WIDTH if case.external else 4, value, "f4")
        model.graph.initializer.append(numpy_helper.from_array(bulk, "bulk"))
        model.graph.node.append(onnx.helper.make_node("Identity", ["bulk"], ["kept"]))
        more: dict[str, Any] = {"save_as_external_data": True, "location": f"{name}.bin"} if case.external else {}
        onnx.save(model, folder / f"{name}.onnx", **more)


def state(path: Path) -> bytes | None:
    """What a model is: its message without the names of data files, and all its weights; None where there is none."""
    if not path.exists():
        return None
    model = onnx.load(path)  # with its weights, or it fails
    for tensor in model.graph.initializer:
        del tensor.external_data[:]
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def rewrite(case: Case) -> tuple[int, str]:
    """Run the command in this process and folder: the exit code and what it said."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(["rewrite", *case.arguments])
    return code, out.getvalue()


def output(case: Case) -> str:
    """The name that is written."""
    return "in.onnx" if "--in-place" in case.arguments else "out.onnx"


@contextlib.contextmanager
def prepared(name: str) -> Iterator[tuple[Case, Path, bytes | None, bytes | None]]:
    """A case in a folder that is the current one: with the output as it was and as it is to be."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        case = CASES[name]
        try:
            os.chdir(folder)
            build(case, Path(folder))
            before = state(Path(output(case)))
            shutil.copytree(folder, Path(folder) / "copy")
            os.chdir(Path(folder) / "copy")
            assert rewrite(case)[0] == 0
            after = state(Path(output(case)))
            os.chdir(folder)
            shutil.rmtree("copy")
            yield case, Path(folder), before, after
        finally:
            os.chdir(here)


CALLS = ("open", "write", "pwrite", "truncate", "fchmod", "fsync", "replace", "rename", "link", "copy_file_range",
         "mkdir")
FAULTS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EDQUOT)


class Faulty:
    """Has the n-th of all calls that write fail; `calls` counts them."""

    def __init__(self, n: int, why: int) -> None:
        self.n, self.why, self.calls, self.failed = n, why, 0, ""

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            writes = name != "open" or (len(args) > 1 and args[1] & (os.O_WRONLY | os.O_RDWR))
            if writes:
                self.calls += 1
                if self.calls == self.n:
                    self.failed = name
                    raise OSError(self.why, os.strerror(self.why))
            return real(*args, **kwargs)

        return call

    def __enter__(self) -> Faulty:
        self.real = {name: getattr(os, name) for name in CALLS if hasattr(os, name)}
        for name, real in self.real.items():
            setattr(os, name, self._wrap(name, real))
        return self

    def __exit__(self, *_: object) -> None:
        for name, real in self.real.items():
            setattr(os, name, real)


def faults(name: str) -> list[str]:
    """Fail every writing call of a case once, and check what is left; gives back the calls that failed."""
    failed: list[str] = []
    with prepared(name) as (case, folder, before, after):
        names = sorted(p.name for p in folder.iterdir())
        content = {p: p.read_bytes() for p in folder.iterdir()}
        for n in range(1, 100):
            with Faulty(n, FAULTS[n % len(FAULTS)]) as faulty:
                code, said = rewrite(case)
            if not faulty.failed:
                assert (code, state(Path(output(case)))) == (0, after), said
                return failed
            failed.append(faulty.failed)
            survived = code == 0  # the folder could not be synced, which not all systems can
            assert survived or (code == 2 and len(said.splitlines()) == 1), (faulty.failed, code, said)
            assert state(Path(output(case))) == (after if survived else before), faulty.failed
            if not survived:
                assert sorted(p.name for p in folder.iterdir()) == names, faulty.failed
            for path in list(folder.iterdir()):
                path.unlink()
            for path, data in content.items():
                path.write_bytes(data)
    raise AssertionError("more than a hundred calls that write")


def kills(count: int, seed: int = 0) -> Counter[str]:
    """Kill the command at random moments; how often the output was old, new or absent afterwards.

    Raises `AssertionError` for an output that is neither.
    """
    rng, found = random.Random(seed), Counter[str]()
    for k, name in enumerate(CASES):
        with prepared(name) as (case, folder, before, after):
            content = {p: p.read_bytes() for p in folder.iterdir()}
            started = time.monotonic()
            _wait(_start(case))
            whole = time.monotonic() - started
            for _ in range(count // len(CASES) + (k < count % len(CASES))):
                for path in list(folder.iterdir()):
                    path.unlink()
                for path, data in content.items():
                    path.write_bytes(data)
                child = _start(case)
                time.sleep(rng.uniform(0, 1.1 * whole))
                os.kill(child, signal.SIGKILL)
                _wait(child)
                got = state(Path(output(case)))
                assert got in (before, after), f"{name}: neither the old model nor the new one"
                found["new" if got == after else "absent" if got is None else "old"] += 1
                for path, data in content.items():
                    assert path.name == output(case) or path.read_bytes() == data, f"{name}: {path.name} has changed"
                found["left a temporary file"] += any(p.name.startswith(".normfuse-") for p in folder.iterdir())
    return found


def _start(case: Case) -> int:
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            rewrite(case)
        os._exit(0)
    return child


def _wait(child: int) -> None:
    os.waitpid(child, 0)
