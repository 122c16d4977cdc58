"""README and docs: every command in them runs, and what they print is what they show."""

from __future__ import annotations

from collections import Counter
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import normfuse
from normfuse.cli import main
from normfuse.graph import KINDS
from normfuse.sessions import session
from tests.bench import pages
from tests.families import cached_export

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
README = PAGES["README.md"]
FENCED = [(page, language, text) for page, whole in PAGES.items() if page != "extending.md"
          for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", whole, re.DOTALL | re.MULTILINE)]  # fmt: skip
PROGRAMS = [(f"{page}-{i}", text) for i, (page, language, text) in enumerate(FENCED) if language == "python"]


def without_time(text: str) -> list[str]:
    return [re.sub(r"\d+\.\d\d s$", "s", line.rstrip()) for line in text.strip().splitlines()]


def printed(command: str, folder: Path) -> str:
    """What a command line of NormFuse prints, run in a folder."""
    argv = [sys.executable, "-m", "normfuse", *shlex.split(command)]
    return subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(torch.__version__ < "2.13", reason="before 2.13 the exporter has other names for nodes")
def test_the_first_screen_is_what_rewrite_prints(tmp_path: Path) -> None:
    found = re.search(r"<!-- output: (.*?) -->\n```\n(.*?)```", README, re.DOTALL)
    assert found is not None
    shutil.copy(cached_export("gemma3", 18), tmp_path / "gemma3.onnx")
    assert without_time(printed(found[1], tmp_path)) == without_time(found[2])


def test_the_conversion_of_a_pretrained_model(tmp_path: Path) -> None:
    """Its errors are compared by size: they are roundings, of another processor as well."""
    package = importlib.util.find_spec("rapidocr_onnxruntime")
    if package is None or package.origin is None:
        pytest.skip("rapidocr-onnxruntime is not installed")
    shutil.copy(Path(package.origin).parent / "models/ch_PP-OCRv4_rec_infer.onnx", tmp_path / "ocr.onnx")
    shown = re.search(r"^\$ normfuse (rewrite ocr\.onnx .*)\n\.\.\.\n((?:.+\n)+?)```", README, re.MULTILINE)
    assert shown is not None
    number = r"\d\.\d+e-\d+"
    wanted, out = shown[2].strip(), printed(shown[1], tmp_path)
    assert re.sub(number, "E", wanted) in re.sub(number, "E", out)
    line = next(line for line in out.splitlines() if line.startswith("certificate"))
    errors = zip(re.findall(number, wanted), re.findall(number, line), strict=True)
    assert all(float(want) / 5 < float(got) < 5 * float(want) for want, got in errors)
    x = np.random.default_rng(0).standard_normal((4, 3, 48, 320)).astype(np.float32)
    # ONNX Runtime's optimiser rounds the weights of convolutions anew, of the original too: by 5e-6
    files = (("ocr.onnx", False), ("ocr_rms.onnx", False), ("ocr_rms.onnx", True))
    want, got, fast = (session(tmp_path / name, optimise=optimise).run(None, {"x": x})[0] for name, optimise in files)
    assert np.abs(want - got).max() <= 2e-6
    assert (want.argmax(-1) == got.argmax(-1)).all() and (want.argmax(-1) == fast.argmax(-1)).all()


def test_the_rows_of_a_target(tmp_path: Path) -> None:
    shown = re.search(r"`normfuse (rewrite \S+ \S+ --target .*?)`.*?```\n(.*?)```", PAGES["targets.md"], re.DOTALL)
    assert shown is not None
    shutil.copy(cached_export("llama", 18), tmp_path / "llama.onnx")
    out = printed(shown[1], tmp_path)
    assert [line for line in out.splitlines() if line.startswith("note:")] == shown[2].strip().splitlines()


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the programs of the pages take for granted: some model, as module, program and file."""
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)).eval()
    args, folder = (torch.randn(2, 8),), tmp_path_factory.mktemp("pages")
    normfuse.export(module, args, folder / "model.onnx", normfuse.Config(target="normfuse"))
    shutil.copy(folder / "model.onnx", folder / "fused.onnx")
    return {"torch": torch, "normfuse": normfuse, "onnxruntime": importlib.import_module("onnxruntime"),
            "module": module, "args": args, "model": module, "example_inputs": args,
            "exported_program": torch.export.export(module, args), "folder": folder}  # fmt: skip


@pytest.mark.parametrize(("name", "program"), PROGRAMS, ids=[name for name, _ in PROGRAMS])
def test_the_programs_run(name: str, program: str, names: dict[str, Any], tmp_path: Path,
                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    for source in names["folder"].iterdir():
        shutil.copy(source, tmp_path)
    monkeypatch.chdir(tmp_path)
    for made in re.findall(r'rewrite\(.*?, "(\w+\.onnx)"', program):
        (tmp_path / made).unlink(missing_ok=True)
    exec(compile(program, name, "exec"), dict(names))


COMMANDS = sorted({line for _, language, text in FENCED if not language
                   for line in re.findall(r"^(?:\$ )?normfuse (\w.*?)(?:\s+#.*)?$", text, re.MULTILINE)})  # fmt: skip
"""Command lines in the pages, each of which some test here or elsewhere runs; here their arguments are read."""


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_are_understood(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                     capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code = main(shlex.split(command))
    assert code == 2 and "no such file" in capsys.readouterr().err.lower()  # and not: unknown option


@pytest.mark.parametrize("page", pages.PAGES)
def test_the_tables_are_what_was_measured(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert pages.filled(page, text) == text, "python -m tests.bench.pages writes them"


def test_the_architectures_are_those_that_were_looked_at() -> None:
    rows = json.loads((ROOT / "tests/bench/results/auto-models.json").read_text())["models"]
    tried = [row for row in rows if "norms" in row]
    norms, found, more = (sum(row[key] for row in tried) for key in ("norms", "found", "more"))
    text = re.sub(r"\s+", " ", README)
    assert f"Of the {len(rows)} architectures" in text and f"{len(tried)} go through `torch.export`" in text
    assert f"call norms {norms:,} times: {found:,} are found, and {more} more" in text
    assert f"The other {norms - found} are none" in text
    missing = [name for row in tried for name in row["missing"]]
    assert {name.partition(" ")[0] for name in missing} == {"HYV4UnweightedRMSNorm", "ZayaQKNorm"}
    timm = json.loads((ROOT / "tests/bench/results/timm-models.json").read_text())
    norms, found = (sum(row[key] for row in timm["models"]) for key in ("norms", "found"))
    assert f"Of timm {timm['timm']}, {len(timm['models'])} models" in text
    assert f"{found:,} of {norms:,} are found" in text
    kinds = Counter(name.partition(" ")[0] for row in timm["models"] for name in row["missing"])
    assert kinds == {"GlobalResponseNorm": 26, "LayerNorm": 28}
    assert "global response norms (26) and LayerNorms of a single channel, of which only the bias is left (28)" in text


def test_a_table_that_is_not_there_is_told() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    with pytest.raises(AssertionError, match="no table that starts with"):
        pages.filled("README.md", text.replace("| layers |", "| depth |"))


def mentioned(pattern: str) -> list[str]:
    return sorted({m for text in PAGES.values() for m in re.findall(pattern, text)})


def test_what_the_pages_mention_is_there() -> None:
    for module in mentioned(r"python -m (tests(?:\.\w+)+)"):
        assert importlib.util.find_spec(module) is not None, module
    for command in mentioned(r"`normfuse (\w+)[ `]"):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert not ended.value.code, command
    for path in mentioned(r"`((?:tests|passes|normfuse|examples|docs)/[\w./-]+\.\w+)`"):
        assert (ROOT / path).exists(), path
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert ((ROOT if page == "README.md" else ROOT / "docs") / link).exists(), (page, link)


def test_the_picture_names_what_is_there() -> None:
    picture = (ROOT / "docs/architecture.svg").read_text(encoding="utf-8")
    for name in re.findall(r"[\w/*]+(?:\.py|\*)|\w+/(?=[\s<:;,])", picture.partition("</defs>")[2]):
        places = [ROOT, ROOT / "normfuse", ROOT / "normfuse/frontends"]
        assert any(list(place.glob(name)) for place in places), name
    assert f"{len(KINDS)} kinds of node" in picture


def test_the_two_commands_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
    assert "make demo" in README and "make test" in README
