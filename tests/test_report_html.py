"""The pages: nothing in them is loaded or run, whatever names a model has; they say what was done, and are small."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html import escape
from html.parser import HTMLParser
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import normfuse
from normfuse import bench, cli_bench
from normfuse.card import Card
from normfuse.codes import CODES
from normfuse.errors import InputError
from normfuse.html import page, svg
from normfuse.html.gallery_page import Entry, gallery
from normfuse.html.style import STYLE
from normfuse.report import NormRecord, RefusalRecord, Report
from tests.bench.llama_layers import cached_llama
from tests.cli_tools import EVIL, fails, norm_model, run, saved
from tests.families import FAMILIES, cached_export, exported_program
from tests.pt2_cases import exported, saved as saved_program

ATTACKS = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</title></style><svg onload=alert(1)>",
           "javascript:alert(1)", "&lt;b&gt;", "</bdi><a href=http://example.org>", EVIL, "\ud800", "\x00",
           "]]><!--", "'onclick=alert(1) x='"]  # fmt: skip
HOSTILE = "".join(ATTACKS[:6])
VOID = {"meta", "br", "rect", "line", "polyline", "polygon", "circle"}
TAGS = VOID | set("""html head title style body main header section article nav h1 h2 h3 p a code pre span bdi strong b
    div table thead tbody tr th td dl dt dd details summary figure figcaption sup svg text""".split())
ATTRIBUTES = set("""lang charset name content http-equiv id class href tabindex role aria-label aria-labelledby
    aria-hidden open scope data-label width height viewbox x y x1 y1 x2 y2 rx r cx cy points""".split())


class Page(HTMLParser):
    """Reads a page as a browser would, and fails on whatever it could load, run or leave open."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.ids: set[str] = set()
        self.heads: list[str] = []
        self.links: set[str] = set()
        assert source.startswith(page.START)
        self.feed(source)
        self.close()
        assert self.open == []
        assert self.links <= self.ids
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, tag
        for key, value in attrs:
            assert key in ATTRIBUTES, (tag, key)
            if key == "href":
                assert value is not None and value.startswith("#")
                self.links.add(value[1:])
            if key == "id":
                assert value not in self.ids
                self.ids.add(value or "")
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch(r"h\d", tag):
            self.heads.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            assert not re.search(r"url\(|@import|expression|http", data)
        else:
            assert not any(not c.isprintable() and c not in "\n " for c in data)
            self.words.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    def handle_pi(self, data: str) -> None:
        raise AssertionError(data)


def read(path: Path) -> Page:
    source = path.read_text(encoding="utf-8")
    assert f'<meta http-equiv="Content-Security-Policy" content="{page.POLICY}">' in source
    assert page.POLICY == "default-src 'none'; style-src 'unsafe-inline'"
    found = Page(source)
    assert found.heads[0] == "h1" and found.heads.count("h1") == 1
    assert all(b <= f"h{int(a[1]) + 1}" for a, b in pairwise(found.heads))
    return found


# -- names that attack ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", [*ATTACKS, "\u05d0\u202e\u2066", "a" * 1_000_000], ids=range(len(ATTACKS) + 2))
def test_text_is_harmless(attack: str) -> None:
    shown = page.document(attack, page.name(attack) + page.text(attack) + page.formula(attack) + page.table(
        (page.name(attack),), [(page.name(attack),)], label=attack))  # fmt: skip
    Page(shown)
    assert len(shown) < 20_000


def hostile_model(name: str) -> onnx.ModelProto:
    """A norm, a near miss and an unknown operator, all named as given."""
    near = norm_model("near ", outside=True)
    model = norm_model(name)
    graph = model.graph
    for node in graph.node:
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=repr(["", name, "mul"]))
    graph.node.extend(near.graph.node)
    graph.initializer.extend(near.graph.initializer)
    graph.input.extend(near.graph.input)
    graph.output.extend(near.graph.output)
    for node in list(graph.node)[6:]:
        node.name = name + node.name
    graph.node.append(helper.make_node(name, [name + "y"], [name + "z"], name=name, domain="acme"))
    graph.output.append(helper.make_tensor_value_info(name + "z", TensorProto.FLOAT, None))
    graph.name = name
    return model


@pytest.mark.parametrize("name", [HOSTILE, EVIL, "n" * 1_000_000], ids=["markup", "terminal", "long"])
def test_a_hostile_model(name: str, tmp_path: Path) -> None:
    path = saved(hostile_model(name), tmp_path / "m.onnx")
    assert run("rewrite", path, tmp_path / "o.onnx", "--report", tmp_path / "r.html")[0] == 0
    assert run("inspect", path, tmp_path / "o.onnx", "--report", tmp_path / "g.html")[0] == 0
    for file in ("r.html", "g.html"):
        read(tmp_path / file)
        assert (tmp_path / file).stat().st_size < 100_000
    text = read(tmp_path / "r.html").text
    assert name[:20] in text or EVIL in name
    assert "NF101" in text


def test_a_hostile_file_name(tmp_path: Path) -> None:
    entries = [Entry(f"folder/{attack}", None, attack) for attack in ATTACKS] + [Entry(HOSTILE, Report())]
    Page(gallery(entries))
    Page(gallery(entries[:1]))


def test_hostile_records() -> None:
    """Whatever stands in a report: every field of text at once."""
    evil = " ".join(ATTACKS)
    norm = NormRecord(evil, evil, [-1], None, 1e-6, evil, evil, evil, evil, evil, evil, evil, evil, True, evil, evil,
                      float("nan"), float("inf"), {"verdict": evil, "code": evil, "reason": evil, "derivation": [evil],
                                                   "readers": [evil] * 100, "edits": [], "operators": [evil],
                                                   "value_dependent": [evil]}, evil, [evil])  # fmt: skip
    report = Report([norm], [RefusalRecord(evil, evil, evil)], evil, evil, 18, True, 1, 2, {evil: 1.0}, [evil],
                    card=Card(), operators_before={evil: 1}, operators_after={evil: 2}, replay=evil)  # fmt: skip
    assert "alert(1)" in Page(report.to_html()).text


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


# -- size ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # exports them
def test_eighty_layers_are_small(tmp_path: Path) -> None:
    code, _, _ = run("rewrite", cached_llama(80), tmp_path / "o.onnx", "--report", tmp_path / "r.html")
    assert code == 0
    assert (tmp_path / "r.html").stat().st_size < 2_000_000
    text = read(tmp_path / "r.html").text
    assert "all 80 layers" in text and "161 of 161 norms replaced" in text
    assert "model.model.layers.79.post_attention_layernorm" in text


def test_many_norms_that_are_all_different(tmp_path: Path) -> None:
    """Ten thousand kinds of norms and as many refusals: the page is cut, and says so."""
    norms = [NormRecord(f"n{i}", "rms_norm", [-1], i, 1e-6, "float32", "w", None, "pre", "w*x", "op", "float32",
                        "fused", True, "op", "", 0.5, 0.4, operators=["Mul"] * 7) for i in range(10_000)]  # fmt: skip
    report = Report(norms, [RefusalRecord("NF101", f"r{i}", "why") for i in range(10_000)], rewritten=True)
    report.save_html(tmp_path / "r.html")
    assert (tmp_path / "r.html").stat().st_size < 2_000_000
    text = read(tmp_path / "r.html").text
    assert "9800 more groups are left out" in text and "9,800 more rows are left out" in text


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


# -- in a browser --------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")


def console(path: Path) -> list[str]:
    """What a browser logs about a page: each load that the policy forbids, and each error of a script or a style."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={path.parent / 'profile'}",
               "--enable-logging=stderr", "--log-level=0", "--virtual-time-budget=2000", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert len(done.stdout) > 100
    return [line for line in done.stderr.splitlines() if ":CONSOLE:" in line]


def widths(*paths: Path, width: int = 400) -> list[int]:
    """How wide pages want to be on a phone: in frames of a page whose script asks them."""
    frames = "".join(f'<iframe width="{width}" height="900" srcdoc="{escape(p.read_text("utf-8"))}"></iframe>'
                     for p in paths)  # fmt: skip
    ask = ("onload=()=>{document.title='widths '+[...document.querySelectorAll('iframe')].map(f=>"
           "f.contentDocument.documentElement.scrollWidth).join(' ')}")  # fmt: skip
    asking = paths[0].parent / "asking.html"
    asking.write_text(f"<!doctype html><style>iframe{{border:0}}</style>{frames}<script>{ask}</script>", "utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={asking.parent / 'profile'}",
               "--virtual-time-budget=2000", "--dump-dom", asking.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<title>widths ([\d ]+)</title>", done.stdout)
    assert found is not None
    return [int(n) for n in found[1].split()]


@pytest.mark.skipif(not BROWSER, reason="no chromium")
def test_a_browser_has_nothing_to_complain_of(tmp_path: Path) -> None:
    path = saved(hostile_model(HOSTILE), tmp_path / "m.onnx")
    run("rewrite", path, tmp_path / "o.onnx", "--report", tmp_path / "r.html")
    run("inspect", path, cached_export("gemma3", 18), "--report", tmp_path / "g.html")
    control = tmp_path / "control.html"
    control.write_text(page.document("x", "<img src='http://127.0.0.1:9/x.png'><script>1</script>" + "x" * 100))
    assert len(console(control)) == 2
    assert console(tmp_path / "r.html") == console(tmp_path / "g.html") == []
    control.write_text(page.document("x", f"<pre style='white-space:pre'>{'x' * 100}</pre>"))
    fits, other, wide = widths(tmp_path / "r.html", tmp_path / "g.html", control)
    assert max(fits, other) <= 400 < wide
