"""Pages of hostile and of large models: nothing in them is loaded or run, whatever the names, and they are small."""

from __future__ import annotations

import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from normfuse.card import Card
from normfuse.html import page
from normfuse.html.gallery_page import Entry, gallery
from normfuse.report import NormRecord, RefusalRecord, Report
from tests.bench.llama_layers import cached_llama
from tests.cli_tools import EVIL, norm_model, run, saved
from tests.families import cached_export
from tests.html_tools import ATTACKS, HOSTILE, Page, read


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
