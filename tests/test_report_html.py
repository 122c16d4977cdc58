"""The pages say what was done, and are written over nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import normfuse
from normfuse import bench, cli_bench
from normfuse.codes import CODES
from normfuse.errors import InputError
from normfuse.html import svg
from normfuse.html.style import STYLE
from tests.cli_tools import fails, norm_model, run, saved
from tests.families import FAMILIES, cached_export, exported_program
from tests.pt2_cases import exported, saved as saved_program
from tests.html_tools import Page, read


# -- what the pages say --------------------------------------------------------------------------------------------


def test_the_report_on_a_rewrite(tmp_path: Path) -> None:
    source, target = tmp_path / "gemma3.onnx", tmp_path / "out.onnx"
    shutil.copy(cached_export("gemma3", 18), source)
    code, out, _ = run("rewrite", source, target, "--verify", "model", "--report", tmp_path / "r.html")
    assert code == 0 and out.endswith(f"wrote {target}\nwrote {tmp_path / 'r.html'}\n")
    text = read(tmp_path / "r.html").text
    for words in ("13 of 13 norms replaced; 13 of 13 checked against the original and equal, 13 proved in exact "
                  "arithmetic; the whole model gives equal outputs",
                  "198 → 120 operators, −39 %", "w·x·(mean(x 2 ) + 1e-06) −1/2",
                  "before , 7 operators Pow ReduceMean Add Sqrt Reciprocal Mul Mul", "now function normfuse.rms_norm",
                  "model.model.layers.1.post_attention_layernorm", "ReduceMean 13 0 −13", "normfuse.rms_norm 0 13 +13",
                  "x + RMSNorm(attention(RMSNorm(x)))", f"normfuse rewrite {source} {target} --verify model --report",
                  f"{source.stat().st_size:,} bytes", f"torch {metadata.version('torch')}"):  # fmt: skip
        assert words.replace("before ,", "before,") in text, words
    for file in (source, target):
        assert hashlib.sha256(file.read_bytes()).hexdigest() in text
    drawn = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert drawn.count('<circle class="before"') == drawn.count('<circle class="after"') == 13


def test_python_writes_the_same_page(tmp_path: Path) -> None:
    source, target = cached_export("gemma3", 18), tmp_path / "out.onnx"
    report = normfuse.rewrite(source, target)
    report.save_html(tmp_path / "r.html")
    text = read(tmp_path / "r.html").text
    assert "7 operators Pow ReduceMean" in text and "model.model.layers.0.self_attn.q_norm" in text
    call = re.search(r"normfuse\.rewrite\(.*?\)\)", text)
    assert call is not None
    first = target.read_bytes()
    target.unlink()
    eval(call[0])
    assert target.read_bytes() == first


def test_the_report_on_an_exported_program(tmp_path: Path) -> None:
    family = FAMILIES["olmo2"]
    _, report = normfuse.optimize(exported_program(family.build(), family.args()))
    report.save_html(tmp_path / "r.html")
    text = read(tmp_path / "r.html").text
    for words in ("model.model.layers.0.self_attn.k_norm", "x + RMSNorm(attention(x))", "RMSNorm · q, full width",
                  "pow mean add rsqrt mul", "rsqrt 9 0 −9"):  # fmt: skip
        assert words in text, words


@pytest.mark.parametrize("convert", [False, True])
def test_the_report_on_a_model_in_memory(convert: bool) -> None:
    """What is there no more when the page is made: operators, modules and the recipe of the model before."""
    before = normfuse.inspect(cached_export("gpt2" if convert else "gemma3", 18))
    config = normfuse.Config(layernorm_to_rmsnorm="exact" if convert else "off", force=convert)
    _, report = normfuse.optimize(onnx.load(cached_export("gpt2" if convert else "gemma3", 18)), config)
    assert report.card is not None and before.card is not None and report.card.to_dict() == before.card.to_dict()
    assert report.operators_before == before.operators_before
    assert [(n.operators, n.module) for n in report.norms] == [(n.operators, n.module) for n in before.norms]
    text = Page(report.to_html()).text
    words = ("ONNX model", "LayerNormalization 5 0 −5", "before, 1 operator LayerNormalization → now",
             "x + attention(LayerNorm(x))") if convert else \
            ("ONNX model", "ReduceMean 13 0 −13", "before, 7 operators Pow", "model.model.layers.0.self_attn.q_norm",
             "x + RMSNorm(attention(RMSNorm(x)))")  # fmt: skip
    assert all(part in text for part in words)


def test_the_report_on_a_module() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4))
    config = normfuse.Config(layernorm_to_rmsnorm="exact", force=True)
    _, report = normfuse.optimize(model, config, args=(torch.randn(2, 16),))
    assert report.converted == 1 and report.operators_before == {"linear": 2, "layer_norm": 1}
    assert report.nodes_before == 3
    text = Page(report.to_html()).text
    for words in ("PyTorch module", "before, 1 operator layer_norm → now normfuse.nn.RMSNorm", "LayerNorm",
                  "layer_norm 1 0 −1"):  # fmt: skip
        assert words in text, words


def test_the_report_on_a_pt2(tmp_path: Path) -> None:
    source, target = saved_program(exported("small"), tmp_path / "a.pt2"), tmp_path / "b.pt2"
    assert run("rewrite", source, target, "--trust", "--report", tmp_path / "r.html")[0] == 0
    text = read(tmp_path / "r.html").text
    for file in (source, target):
        assert hashlib.sha256(file.read_bytes()).hexdigest() in text
    assert f"a.pt2 , {source.stat().st_size:,} bytes" in text and "rsqrt 1 0 −1" in text
    report = normfuse.rewrite(source, target, overwrite=True, trust=True)
    assert report.replay.endswith(", trust=True)") and report.source == str(source) and report.target == str(target)


def test_a_dropout_ahead_of_a_norm_is_no_part_of_it() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Dropout(), torch.nn.LayerNorm(16)).eval()
    (norm,) = normfuse.inspect(torch.export.export(model, (torch.randn(2, 16),))).norms
    assert norm.operators == ["layer_norm"] and norm.module == "2"


def test_latency_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(bench, "SECONDS", 0.05)
    monkeypatch.setattr(bench, "memory", lambda *_: None)
    path, target, shown = saved(norm_model(), tmp_path / "m.onnx"), tmp_path / "o.onnx", tmp_path / "r.html"
    code, out, _ = run("rewrite", path, target, "--report", shown)
    assert code == 0 and f"Not measured: run normfuse rewrite with --bench , or normfuse bench {path} {target}" in \
        read(shown).text  # fmt: skip
    code, out, _ = run("rewrite", path, target, "--report", shown, "--overwrite", "--bench", "--json")
    found = json.loads(out)["summary"]["latency"]
    assert code == 0 and [m["path"] for m in found["models"]] == [str(path), str(target)]
    text = read(shown).text
    ratio = found["ratio"]["cpu"]
    assert f"cpu: the result takes {ratio['median']:.2f} of the original" in text
    a, b = (cli_bench.ms(m["providers"]["cpu"]["milliseconds"]["median"]) for m in found["models"])
    assert f"{a} → {b} ms median latency, cpu" in text and f"before, cpu, {a} ms" in text
    assert f"a copy, {found['copy_gb_per_s']:.3g} GB/s" in text and "Not measured" not in text
    code, out, _ = run("rewrite", path, target, "--overwrite", "--bench")
    assert "cpu: B takes" in out and "GB/s" in out


def test_what_cannot_be_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    path, target = saved(norm_model(), tmp_path / "m.onnx"), tmp_path / "o.onnx"
    program = saved_program(exported("small"), tmp_path / "a.pt2")
    for words, message in (
        ([path, target, "--bench", "--dry-run"], "--dry-run"),
        ([path, "--bench", "--in-place"], "--in-place"),
        ([path, target, "--size", "n=2"], "--bench"),
        ([path, target, "--bench", "--size", "n"], "--size n"),
        ([path, target, "--bench", "--size", "nothing=2"], "no size of an input is named 'nothing'"),
        ([program, tmp_path / "b.pt2", "--bench", "--trust"], "bench runs ONNX models"),
    ):  # fmt: skip
        assert message in fails(run("rewrite", *words))
        assert not target.exists()
    for error, said in ((normfuse.InputError("too large"), "too large"), (MemoryError("none"), "MemoryError: none")):
        monkeypatch.setattr(bench, "make_feeds", raises(error))
        code, out, _ = run("rewrite", path, target, "--bench", "--overwrite", "--report", tmp_path / "r.html")
        assert code == 0 and target.exists() and f"the latency was not measured: {said}" in out
        assert f"the latency was not measured: {said}" in read(tmp_path / "r.html").text


def raises(error: Exception) -> Callable[..., None]:
    def call(*_: object) -> None:
        raise error

    return call


def test_refusals_say_what_to_change(tmp_path: Path) -> None:
    path = saved(norm_model(outside=True), tmp_path / "m.onnx")
    run("rewrite", path, tmp_path / "o.onnx", "--report", tmp_path / "r.html")
    text = read(tmp_path / "r.html").text
    assert "Nothing was replaced; 1 refused, with the reason below." in text
    refused = normfuse.inspect(path).refusals[0]
    assert f"{refused.code} {CODES[refused.code].title}" in text
    assert refused.message in text and CODES[refused.code].fix in text


def test_layernorm_to_rmsnorm_with_its_derivation(tmp_path: Path) -> None:
    report = normfuse.rewrite(cached_export("gpt2", 18), tmp_path / "o.onnx",
                              normfuse.Config(layernorm_to_rmsnorm="exact", force=True))  # fmt: skip
    report.save_html(tmp_path / "r.html")
    text = read(tmp_path / "r.html").text
    assert "5 of 5 LayerNorms are RMSNorms now." in text and "Certificate: equal to" in text
    for norm in report.norms:
        assert norm.conversion is not None
        for line in norm.conversion["derivation"]:
            assert " ".join(line.split()) in text


def test_an_approximation_is_plotted(tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    source = cached_export("bert", 18)
    tokens = [{"input_ids": np.random.default_rng(i).integers(3, 128, (2, 7))} for i in range(4)]
    report = normfuse.rewrite(source, tmp_path / "o.onnx", normfuse.Config("approximate", tolerance=10.0, force=True),
                              calibration=tokens)  # fmt: skip
    rough = [n for n in report.norms if (n.conversion or {}).get("verdict") == "approximate"]
    assert len(rough) >= family.norms - 1
    drawn = report.to_html()
    text = Page(drawn).text
    assert f"Approximated {len(rough)} norms with biases calibrated on 3 sets of inputs. On 1 held back" in text
    assert drawn.count('<svg class="plot"') >= 2
    assert drawn.count('<circle class="before"') >= len(rough)


def test_the_gallery(tmp_path: Path) -> None:
    models = [cached_export(name, 18) for name in ("llama", "gemma3", "bert")]
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"not a model")
    code, out, err = run("inspect", *models, bad, "--report", tmp_path / "g.html")
    assert code == 2 and "not an ONNX model" in err and out.endswith(f"wrote {tmp_path / 'g.html'}\n")
    drawn = (tmp_path / "g.html").read_text(encoding="utf-8")
    text = Page(drawn).text
    assert "How 4 models normalise" in text and "not an ONNX model" in text
    for words in ("RMSNorm, sandwich, QK-norm per head", "LayerNorm(x + attention(x))", "embedding LayerNorm"):
        assert words in text, words
    assert drawn.count("<svg") == 3
    code, _, _ = run("inspect", models[0], "--report", tmp_path / "one.html")
    assert code == 0 and read(tmp_path / "one.html").text.count("all 2 layers") == 1


def test_parallel_branches_stand_side_by_side() -> None:
    card = normfuse.inspect(cached_export("gpt_neox", 18)).card
    assert card is not None
    drawn = svg.block(card, card.stacks[0].blocks[0], card.stacks[0].depth)
    boxes = {m[1]: float(m[2]) for m in re.finditer(r'<rect class="(attention|ff)" x="([\d.]+)"', drawn)}
    assert boxes["ff"] > boxes["attention"] + 100


def test_norms_outside_stand_at_the_ends_of_the_stack() -> None:
    """Of layers that differ, the last one has the final norm behind it."""
    card = normfuse.inspect(cached_export("deepseek_v3", 18)).card
    assert card is not None
    (stack,) = card.stacks
    drawn = {tuple(block.layers): svg.block(card, block, stack.depth) for block in stack.blocks}
    assert {layers: "final RMSNorm" in shown for layers, shown in drawn.items()} == {(0,): False, (1,): True}
    assert "final" not in svg.block(card, stack.blocks[-1])


@pytest.mark.parametrize(("top", "marks"), [
    (0.0, [0.0, 1.0]), (float("nan"), [0.0, 1.0]), (1.0, [0.0, 0.5, 1.0]), (3.7, [0.0, 1.0, 2.0, 3.0, 4.0]),
    (120.0, [0.0, 50.0, 100.0, 150.0]),
])  # fmt: skip
def test_ticks_are_round(top: float, marks: list[float]) -> None:
    assert svg.ticks(top) == pytest.approx(marks)


def luminance(colour: str) -> float:
    """Of a colour such as #fff, as the guidelines for accessible pages define it."""
    digits = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("dark", [False, True])
def test_colours_can_be_read(dark: bool) -> None:
    """Contrast of text and what it stands on is 4.5 at least, of what is drawn 3."""
    rules = re.findall(r":root\{([^}]*)\}", STYLE)
    colours = dict(re.findall(r"--([\w-]+):(#[0-9a-f]+)", rules[dark]))
    soft = [name for name in colours if name.endswith("-soft")]
    pairs = [(text, ground, 4.5) for text in ("ink", "muted") for ground in ("card", "page", "soft")]
    pairs += [(name.removesuffix("-soft"), name, 4.5) for name in soft] + [("ff", "page", 4.5), ("after", "card", 4.5)]
    pairs += [("muted", f"{kind}-soft", 4.5) for kind in ("rms", "ln", "mix", "ff")]
    pairs += [("before", "card", 3), ("focus", "card", 3), ("focus", "page", 3)]
    assert len(soft) == 7
    for text, ground, least in pairs:
        low, high = sorted(luminance(colours[key]) for key in (text, ground))
        assert (high + 0.05) / (low + 0.05) >= least, (text, ground)


# -- where it is written -------------------------------------------------------------------------------------------


def test_never_over_what_is_there(tmp_path: Path) -> None:
    path = saved(norm_model(), tmp_path / "m.onnx")
    text, empty = tmp_path / "notes.txt", tmp_path / "empty.html"
    text.write_text("my notes")
    empty.write_text("")
    before = path.read_bytes()
    commands = (["inspect", path], ["inspect", path, path], ["rewrite", path, tmp_path / "o.onnx"])
    for command in commands:
        assert "exists already" in fails(run(*command, "--report", empty))
        assert "no HTML page" in fails(run(*command, "--report", text, "--overwrite"))
        assert "is a model" in fails(run(*command, "--report", path, "--overwrite"))
        assert "is a directory" in fails(run(*command, "--report", tmp_path, "--overwrite"))
        assert "does not exist" in fails(run(*command, "--report", tmp_path / "none" / "r.html"))
        assert not (tmp_path / "o.onnx").exists()
    link = tmp_path / "link.html"
    link.symlink_to(path)
    assert "is a model" in fails(run("inspect", path, "--report", link, "--overwrite"))
    assert "is a model" in fails(run("rewrite", path, tmp_path / "o.html", "--report", tmp_path / "o.html"))
    assert path.read_bytes() == before and text.read_text() == "my notes"
    for command in commands:
        assert run(*command, "--report", empty, "--overwrite")[0] == 0
        read(empty)
    with pytest.raises(InputError, match="is a model"):
        normfuse.inspect(path).save_html(path, overwrite=True)
    with pytest.raises(InputError, match="exists already"):
        normfuse.inspect(path).save_html(empty)


@pytest.mark.parametrize("command", ["inspect", "rewrite"])
def test_pipes_and_devices_are_not_replaced(command: str, tmp_path: Path) -> None:
    path, pipe = saved(norm_model(), tmp_path / "m.onnx"), tmp_path / "pipe"
    os.mkfifo(pipe)
    more = [tmp_path / "o.onnx"] if command == "rewrite" else []
    assert "not a regular file" in fails(run(command, path, *more, "--report", pipe, "--overwrite"))
    if more:
        assert "not a regular file" in fails(run("rewrite", path, pipe, "--overwrite"))
    assert pipe.is_fifo()


def test_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = saved(norm_model(), tmp_path / "m.onnx")
    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in fails(run("inspect", path, "--report", tmp_path / "r.html"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx"]


def test_a_dry_run_and_in_place(tmp_path: Path) -> None:
    path = saved(norm_model(), tmp_path / "m.onnx")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert run("rewrite", path, "--dry-run", "--report", tmp_path / "dry.html")[0] == 0
    assert "nothing was written" in read(tmp_path / "dry.html").text
    assert run("rewrite", path, "--in-place", "--report", tmp_path / "r.html")[0] == 0
    text = read(tmp_path / "r.html").text
    assert digest in text and hashlib.sha256(path.read_bytes()).hexdigest() in text
    assert "6 operators Mul ReduceMean Add Sqrt Div Mul" in text


def test_weights_beside_the_model_are_told(tmp_path: Path) -> None:
    model = norm_model()
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.ones(64, np.float32), "w"))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0,
              convert_attribute=False)  # fmt: skip
    run("rewrite", tmp_path / "m.onnx", tmp_path / "o.onnx", "--report", tmp_path / "r.html")
    beside = (tmp_path / "w.bin").stat().st_size
    assert f"w.bin , {beside} B, weights beside it, not hashed" in read(tmp_path / "r.html").text
