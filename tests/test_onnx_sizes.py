"""ONNX graphs with sizes that only a run tells: which of them are known to be the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.onnx_texts import TARGETS, check, model, numbers

NORM = ("{0}q = Mul({0}, {0}) {0}m = ReduceMean({0}q, last) {0}a = Add({0}m, eps) {0}r = Sqrt({0}a) "
        "{0}n = Div({0}, {0}r) ")  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_a_stream_as_long_as_nobody_knows(target: str, tmp_path: Path) -> None:
    """As TorchScript exports BERT: the token types are expanded to sizes that only a run tells, and so the stream has
    unknown ones, which are the same in each layer."""
    made = model("float[B,S,16] x, int64[3] sizes", "e = Expand(token, sizes) h = Add(x, e) " + NORM.format("h")
                 + "f = MatMul(hn, w) k = Add(f, hn) " + NORM.format("k") + "y = MatMul(kn, w)", "float[A,B,C] y",
                 token=numbers(1, 1, 16), w=numbers(16, 16))  # fmt: skip
    feeds = [{"x": numbers(*shape), "sizes": np.array([2, 3, 16])} for shape in ((2, 3, 16), (1, 3, 16), (1, 1, 16))]
    result = check(made, feeds, tmp_path, 2, target)
    added = [node.op_type for node in result.graph.node if "add_rms_norm" in node.op_type]
    assert len(added) == (target == "normfuse")


@pytest.mark.parametrize(("lines", "same"), [
    # torch's expand, in which -1 stands for the size that is there: none of a shape is that
    ("c = Equal(to, minus2) f = Where(c, ones, to)", True),
    ("c = Equal(minus1, to) d = Where(c, ones, to) f = Identity(d)", True),
    ("c = Equal(to, to) f = Where(c, to, fives)", True),
    ("c = Equal(to, to) f = Where(c, fives, to)", False),
    ("c = Equal(to, minus2) f = Where(c, to, fives)", False),
    # a batch of one becomes one of five, and what the caller gives may be -1
    ("c = Equal(to, ones) f = Where(c, fives, to)", False),
    ("c = Equal(to, ones) f = Where(c, to, fives)", False),
    ("t2 = Concat<axis=0>(given0, s1) c = Equal(t2, minus2) f = Where(c, fives, t2)", False),
    ("c = Equal(given, minus2) f = Where(c, fives, to)", False),
    ])  # fmt: skip
def test_sizes_that_are_replaced(lines: str, same: bool, tmp_path: Path) -> None:
    """An addition is taken in where the other summand is surely as large as the stream."""
    vectors = {"zero0": [0], "one0": [1], "minus1": [-1], "minus2": [-1, -1], "ones": [1, 1], "fives": [5, 5],
               "size": [16]}  # fmt: skip
    held: dict[str, Any] = {name: np.array(vector) for name, vector in vectors.items()}
    made = model("float[B,S,16] x, int64[2] given", "given0 = Slice(given, zero0, one0, zero0) sh = Shape(x) "
                 "b1 = Gather(sh, zero0) s1 = Gather(sh, one0) to = Concat<axis=0>(b1, s1) " + lines
                 + " full = Concat<axis=0>(f, size) e = Expand(token, full) h = MatMul(x, w) k = Add(h, e) "
                 + NORM.format("k") + "y = MatMul(kn, w)", "float[A,B,C] y", token=numbers(1, 1, 16),
                 w=numbers(16, 16), **held)  # fmt: skip
    feeds = [{"x": numbers(*shape, 16), "given": np.array(given)}
             for shape, given in (((1, 1), (-1, -1)), ((1, 1), (1, 1)), ((5, 5), (5, 5)))]  # fmt: skip
    result = check(made, feeds, tmp_path, 1, "normfuse")
    assert any("add_rms_norm" in node.op_type for node in result.graph.node) == same


@pytest.mark.parametrize(("cut", "over", "same"), [
    ("Slice(table, zero0, end, one0, one0)", 1, True),
    ("Slice(table, zero0, end, minus2)", 1, True),
    ("Slice(table, end, eight, one0)", 1, True),
    ("Slice(table, zero0, eight, one0)", 1, True),
    ("Slice(table, zero0, end)", 1, False),
    ("Slice(table, zero0, end, zero0)", 1, False),
    ("Slice(table, zero0, end, axes)", 1, False),
    ("Slice(table, zero0, end, , one0)", 1, False),
    ("Slice(table, zero0, end)", 0, True),
    ("Slice(table, zero0, end, zero0)", 0, True),
    ("Slice(table, zero0, end, minus2)", 0, False),
    ("Slice(table, zero0, end, axes)", 0, False),
])
def test_a_table_that_is_cut_to_the_length_of_a_run(cut: str, over: int, same: bool, tmp_path: Path) -> None:
    """The axes that are not cut keep their sizes, and the one that is cut may have any."""
    constants = {"zero0": 0, "one0": 1, "minus2": -2, "eight": 8, "summed": over}
    held: dict[str, Any] = {name: np.array([number]) for name, number in constants.items()}
    shape = [3, 8, 16]
    shape[over] = 1
    made = model(f"float[{','.join(map(str, shape))}] x, int64[S] z, int64[1] axes", f"end = Shape(z) c = {cut} "
                 "p = ReduceSum(c, summed) h = MatMul(x, w) k = Add(h, p) " + NORM.format("k") + "y = MatMul(kn, w)",
                 "float[A,B,C] y", w=numbers(16, 16), table=numbers(3, 8, 16), **held)  # fmt: skip
    feeds = [{"x": numbers(*shape), "z": np.arange(n), "axes": np.array([1 - over])} for n in (1, 8)]
    result = check(made, feeds, tmp_path, 1, "normfuse")
    assert any("add_rms_norm" in node.op_type for node in result.graph.node) == same
