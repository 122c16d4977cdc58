"""Sizes of images that a model leaves open: what is told by its operators, and what is tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from normfuse.errors import InputError
from normfuse.frontends.onnx_open import possible_sizes, stated_sizes
from normfuse.io.files import read_onnx
from normfuse.verify import compare_models
from tests.cli_tools import run, saved


def patches(positions: int, extra: int = 1, table: int = 98, attributes: str = "strides = [4, 4]") -> onnx.ModelProto:
    """A model that cuts an image of open size into patches, and adds positions to them and to `extra` tokens."""
    made = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[B, C, H, W] x, int64[B, T] ids) => (float[b, n, c] y) {{
        image = Conv<{attributes}>(x, k) rows = Reshape(image, shape) p = Transpose<perm = [0, 2, 1]>(rows)
        words = Gather(table, ids) w = ReduceMean<axes = [1]>(words)
        tokens = Concat<axis = 1>(p, {", ".join(["w"] * extra)})
        z = Add(tokens, positions) y = LayerNormalization(z, g) }}""")
    held = {"k": np.ones((8, 3, 4, 4), np.float32), "shape": np.array([0, 8, -1]), "g": np.ones(8, np.float32),
            "positions": np.ones((1, positions, 8), np.float32), "table": np.ones((table, 8), np.float32)}
    made.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in held.items())
    return made


@pytest.mark.parametrize("extra", [1, 2])
@pytest.mark.parametrize("attributes", ["strides = [4, 4]", "strides = [2, 2]"])
def test_a_table_of_positions_says_how_large_an_image_is(extra: int, attributes: str, tmp_path: Path) -> None:
    path = saved(patches(49 + extra, extra, attributes=attributes), tmp_path / "in.onnx")
    side = 28 if attributes == "strides = [4, 4]" else 16
    assert possible_sizes(read_onnx(path)[0])[0] == {"C": 3, "H": side, "W": side}
    assert compare_models(path, path)["equal"]
    assert run("rewrite", path, tmp_path / "out.onnx", "--verify", "model")[0] == 0


@pytest.mark.parametrize(("said", "sizes"), [
    ({"positions": 19}, {(12, 24), (24, 12)}), ({"positions": 50, "table": 64}, {(28, 28), (32, 32)}),
    ({"positions": 50, "attributes": "strides = [2, 2], pads = [1, 1, 1, 1]"}, {(14, 14)}),
    ({"positions": 50, "attributes": 'strides = [4, 4], auto_pad = "SAME_UPPER"'}, {(28, 28)})])
def test_images_that_are_tried(said: dict[str, Any], sizes: set[tuple[int, int]], tmp_path: Path) -> None:
    """No square, one of two squares, patches that overlap the border; and at last those that are tried of any model."""
    path = saved(patches(**said), tmp_path / "in.onnx")
    found = possible_sizes(read_onnx(path)[0])
    assert sizes <= {(one["H"], one["W"]) for one in found[:-1]} and found[-1] == {"C": 3}
    assert compare_models(path, path)["equal"]
    code, out, _ = run("bench", path)
    assert code == 0 and any(f"x 2x3x{h}x{w} float32" in out for h, w in sizes)


def test_a_table_that_is_none_of_positions(tmp_path: Path) -> None:
    """As the mask of a window of Swin: the sizes that it would mean are tried in vain."""
    made = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (float[B, 3, H, W] x) => (float[b, n, m, c] y) { image = Conv<strides = [2, 2], kernel_shape = [2, 2]>(x, k)
        t = Transpose<perm = [0, 2, 3, 1]>(image) r = Reshape(t, shape) a = Add(r, mask)
        y = LayerNormalization(a, g) }""")
    held = {"k": np.ones((16, 3, 2, 2), np.float32), "shape": np.array([-1, 32, 16, 16]), "g": np.ones(16, np.float32),
            "mask": np.ones((16, 16), np.float32)}  # fmt: skip
    made.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in held.items())
    path = saved(made, tmp_path / "in.onnx")
    assert possible_sizes(read_onnx(path)[0])[0] == {"H": 8, "W": 8}
    assert compare_models(path, path)["equal"]
    assert run("rewrite", path, tmp_path / "out.onnx", "--verify", "model", "--target", "normfuse")[0] == 0


def test_inputs_that_do_not_fit_are_told(tmp_path: Path) -> None:
    """Seven positions for the patches and five tokens."""
    path = saved(patches(7, extra=5), tmp_path / "in.onnx")
    with pytest.raises(InputError, match=r"do not run on these inputs: .*; drawn were x 2x3x8x12, ids 2x2, and others"):
        compare_models(path, path)


@pytest.mark.parametrize("count", [2, 60])
def test_weights_that_are_made_in_many_steps_take_no_time(count: int, tmp_path: Path) -> None:
    """Each of them read twice: they are looked through a little way only."""
    steps = "".join(f"w{i + 1} = Add(w{i}, w{i}) " for i in range(count))
    made = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[B, channels, 8, 8] x) => (float[a, b, c, d] y) {{ w0 = Mul(k, s) {steps} y = Conv(x, w{count}) }}""")
    made.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in (
        ("k", np.ones((4, 3, 2, 2), np.float32)), ("s", np.full((4, 1, 1, 1), 1e-20, np.float32))))
    assert stated_sizes(read_onnx(saved(made, tmp_path / "in.onnx"))[0]) == ({"channels": 3} if count == 2 else {})
