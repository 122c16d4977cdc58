"""The wheel holds every source file once, and the core imports neither torch nor onnx."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ("facts", "transfer", "norm", "recognise", "sites", "graph")
HEAVY = {"torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "numpy"}


def sources() -> set[str]:
    """The Python files of the library under the names that they are installed with."""
    library = {str(f.relative_to(ROOT)) for f in (ROOT / "normfuse").rglob("*.py")}
    passes = {f"normfuse/passes/{f.relative_to(ROOT / 'passes')}" for f in (ROOT / "passes").rglob("*.py")}
    return {name for name in library if not name.startswith("normfuse/passes/")} | passes


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the sources, so that nothing is built in the checkout."""
    folder = tmp_path_factory.mktemp("build")
    copied(folder)
    return build(folder)


def copied(folder: Path) -> None:
    """Copy the sources, without what was built in the checkout."""
    for name in ("normfuse", "passes"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder)
    settings = folder / "pyproject.toml"  # nothing of it runs, and -O3 takes 20 s
    settings.write_text(settings.read_text(encoding="utf-8").replace('"-O3"', '"-O0"'), encoding="utf-8")


def build(folder: Path, **environment: str) -> Path:
    """The wheel of a folder."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--wheel-dir", "dist", "."], cwd=folder, capture_output=True, text=True, check=False,
                          env=os.environ | environment)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (folder / "dist").glob("normfuse-*.whl")
    return path


def libraries(wheel: Path) -> list[str]:
    """The compiled files of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return [n for n in archive.namelist() if n.startswith("normfuse/ort/_library")]


def test_wheel_has_the_operators_for_onnx_runtime_where_a_compiler_is(wheel: Path) -> None:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    assert len(libraries(wheel)) == (compiler is not None)


def test_without_a_compiler_all_but_the_operators_installs(tmp_path: Path) -> None:
    copied(tmp_path)
    path = build(tmp_path, CC="/bin/false")
    assert not libraries(path)
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "site")
    load = "from normfuse.ort import register; register(None)"
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {load}"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "UnsupportedError: NormFuse was installed without a C compiler" in done.stderr


def test_sdist_holds_the_sources_of_the_operators(tmp_path: Path) -> None:
    copied(tmp_path)
    code = "import setuptools.build_meta as b; print(b.build_sdist('dist'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    with tarfile.open(tmp_path / "dist" / done.stdout.split()[-1]) as archive:
        held = {Path(name).name for name in archive.getnames() if "/normfuse/ort/" in name}
    assert held >= {f.name for pattern in ("*.c", "*.h", "*.py") for f in (ROOT / "normfuse" / "ort").glob(pattern)}


def test_wheel_holds_every_source_file_once(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert sorted(n for n in names if n.endswith(".py")) == sorted(sources())
    assert "normfuse/py.typed" in names
    assert not [n for n in names if not n.startswith(("normfuse/", "normfuse-"))]


def test_wheel_runs_from_where_it_is_unpacked(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = "import normfuse, normfuse.passes, normfuse.frontends; print(normfuse.__file__, normfuse.passes.__file__)"
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {script}"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert all(path.startswith(str(tmp_path / "site")) for path in done.stdout.split())


def test_passes_are_one_package_in_the_checkout() -> None:
    link = ROOT / "normfuse" / "passes"
    assert link.is_symlink()
    assert str(link.readlink()) == "../passes"


def test_core_imports_nothing_heavy_at_run_time() -> None:
    modules = ", ".join(f"normfuse.{name}" for name in CORE)
    script = f"import {modules}, sys; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", CORE)
def test_core_names_nothing_heavy(name: str) -> None:
    tree = ast.parse((ROOT / "normfuse" / f"{name}.py").read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    assert not {module for module in found if module.split(".")[0] in HEAVY}
    own = {module for module in found if module.startswith("normfuse")}
    assert own <= {f"normfuse.{other}" for other in CORE}


def test_every_public_name_says_what_it_is() -> None:
    import inspect

    import normfuse

    for name in (n for n in normfuse.__all__ if n != "__version__"):
        thing = getattr(normfuse, name)
        public = (v for k, v in vars(thing).items() if not k.startswith("_"))
        members = [v for v in public if callable(v) or isinstance(v, property)]
        for one in [thing, *members] if inspect.isclass(thing) else [thing]:
            assert inspect.getdoc(one), (name, one)


def test_the_oldest_releases_are_those_that_are_allowed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["triton"]
    bounds = [re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement) for requirement in wanted]
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    oldest = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert oldest == {found[1]: f"{found[2]}.0" for found in bounds if found}
