"""The recogniser condition by condition: which values are sites."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from normfuse.graph import Value
from normfuse.recognise import recognise
from tests.build import Build, Spell, centred, leaf, ln, names, opaque, rms, rstd
from tests.neutral import compare


def test_the_last_of_the_steps_is_the_site() -> None:
    g = Build()
    n = rms(g, g.x)
    y = g.op("add", g.op("mul", n, g.w), g.b)
    assert names(g.found(y)) == [y.name]


def test_a_step_that_is_read_by_somebody_else_stands_for_itself() -> None:
    for kept in (True, False):
        g = Build()
        n = rms(g, g.x)
        y = g.op("mul", n, g.w)
        n.kept = kept
        if not kept:
            g.op("opaque", n).kept = True
        found = g.found(y)
        assert names(found) == [n.name]
        assert g.found(y).sites[0].norm.weight is None


@pytest.mark.parametrize("copy", [
    None, lambda g, n: g.op("transpose", n, perm=(0, 1, 2)), lambda g, n: g.op("identity", n),
    lambda g, n: g.op("cast", n, dtype="float32")])  # fmt: skip
def test_a_step_that_is_read_through_a_copy_stands_for_itself(copy: Callable[[Build, Value], Value] | None) -> None:
    g = Build()
    n = ln(g, g.x)
    y = g.op("mul", g.op("neg", n), g.w)
    g.op("opaque", n if copy is None else copy(g, n))
    assert [site.value for site in g.found(y).sites] == [n]


@pytest.mark.parametrize("steps", [
    (lambda g, n: g.op("mul", n, g.c(0.5)), lambda g, n: g.op("mul", n, g.c(2.0))),
    (lambda g, n: g.op("mul", n, g.c(0.5)), lambda g, n: g.op("mul", n, g.c(0.5))),
    (lambda g, n: g.op("mul", n, g.c(0.5)), lambda g, n: g.op("neg", n)),
    (lambda g, n: g.op("identity", n), lambda g, n: g.op("mul", g.op("identity", n), g.c(0.5))),
    (lambda g, n: g.op("mul", n, g.c(0.5)), lambda g, n: g.op("add", n, g.c(1.0)), lambda g, n: g.op("neg", n)),
    (lambda g, n: g.op("mul", n, g.w), lambda g, n: g.op("neg", n)),
])  # fmt: skip
@pytest.mark.parametrize("norm", [rms, ln])
def test_a_norm_that_is_read_times_several_numbers_is_one(norm: Callable[[Build, Value], Value],
                                                          steps: tuple[Spell, ...]) -> None:  # fmt: skip
    g = Build()
    n = g.op("mul", norm(g, g.x), g.w)
    for end in [step(g, n) for step in steps]:  # type: ignore[call-arg]
        end.kept = True
    found = recognise(g.graph)
    assert [site.value for site in found.sites] == [n]
    assert compare(found, g.graph) == 1


def test_a_norm_without_a_weight_is_as_many_norms_as_it_is_given_weights() -> None:
    """One operator that is a norm already stays what it is, though."""
    for whole, last in ((False, "mul"), (True, "mul"), (False, "neg"), (True, "neg")):
        g = Build()
        n = g.op("rms_norm", g.x, axes=(2,), eps=1e-5) if whole else rms(g, g.x)
        y = g.op("mul", n, g.w)
        z = g.op("neg", n) if last == "neg" else g.op("mul", n, g.b)
        y.kept = z.kept = True
        assert [site.value for site in recognise(g.graph).sites] == ([n] if whole else [y, z])


@pytest.mark.parametrize(("norm", "several", "one"), [(ln, 2, False), (ln, 3, True), (rms, 3, False), (rms, 4, True)])
def test_a_norm_of_many_weights_is_one(norm: Callable[[Build, Value], Value], several: int, one: bool) -> None:
    g = Build()
    n = norm(g, g.x)
    ends = [g.op("mul", n, leaf(g, 64, name=f"w{i}", fixed=True)) for i in range(several)]
    for end in ends:
        end.kept = True
    found = recognise(g.graph)
    assert [site.value for site in found.sites] == ([n] if one else ends)
    assert compare(found, g.graph) == len(found.sites)


def test_a_norm_of_nothing_is_none() -> None:
    g = Build(("B", "S", 0))
    assert not g.found(rms(g, g.x)).sites


def test_a_transposed_norm_that_is_read_times_several_numbers_is_the_norms_it_comes_back_as() -> None:
    g = Build()
    scale = g.op("transpose", rstd(g, g.x), shape=("S", "B", 1), perm=(1, 0, 2))
    n = g.op("mul", g.op("transpose", g.x, shape=("S", "B", 64), perm=(1, 0, 2)), scale)
    back = [g.op("transpose", g.op("mul", n, g.c(c)), shape=("B", "S", 64), perm=(1, 0, 2)) for c in (0.5, 3.0)]
    found = g.found(*back)
    assert len(found.sites) == 2 and compare(found, g.graph) == 2


def test_a_norm_that_numbers_lead_to_one_norm_is_a_step() -> None:
    """w*n/2 + n: both readers of n come to the same."""
    g = Build()
    n = rms(g, g.x)
    y = g.op("add", g.op("mul", g.op("mul", n, g.c(0.5)), g.w), n)
    found = g.found(y)
    assert names(found) == [y.name] and compare(found, g.graph) == 1


def test_a_step_that_another_norm_reads_stands_for_itself() -> None:
    """w*n + b where n is read by a norm of its own: the step has two uses, both come to norms of x and of n."""
    g = Build()
    n = g.op("mul", rms(g, g.x), g.w)
    y = g.op("add", n, g.b)
    second = rms(g, y)
    found = g.found(second)
    assert names(found) == [y.name, second.name]
    assert compare(found, g.graph) == 2


def test_a_norm_whose_own_norm_is_scaled_is_two_norms() -> None:
    g = Build()
    first = g.op("mul", ln(g, g.x), g.w)
    second = g.op("mul", ln(g, first), g.b)
    found = g.found(second)
    assert names(found) == [first.name, second.name] and [s.norm.x for s in found.sites] == [g.x, first]
    assert compare(found, g.graph) == 2


def test_a_norm_of_a_centred_tensor_is_a_layer_norm_of_the_tensor() -> None:
    g = Build()
    c = centred(g, g.x)
    found = g.found(g.op("mul", c, rstd(g, c)))
    assert [(s.norm.x.name, s.norm.kind) for s in found.sites] == [("x", "layer_norm")]
    g = Build()
    c = g.op("add", centred(g, g.x), g.b)
    found = g.found(g.op("mul", c, rstd(g, c)))
    assert [(s.norm.x.name, s.norm.kind) for s in found.sites] == [(c.name, "rms_norm")]


@pytest.mark.parametrize(("one", "read", "kind"), [
    (True, "read", "rms_norm"), (True, "kept", "rms_norm"), (True, "", "layer_norm"), (False, "read", "layer_norm")])
def test_an_operator_of_what_is_centred_for_others_too_is_an_rms_norm(one: bool, read: str, kind: str) -> None:
    """What a LayerNorm has been converted to; nothing is missed where the mean is taken."""
    g = Build()
    c = centred(g, g.x)
    first = len(g.graph.nodes)
    y = g.op("mul", c, rstd(g, c))
    for node in g.graph.nodes[first:]:
        node.native = "operator" if one else node.native
    c.kept = read == "kept"
    if read == "read":
        opaque(g, c, kept=True)
    opaque(g, g.op("mul", y, g.w), kept=True)
    found = recognise(g.graph)
    assert [(s.norm.x.name, s.norm.kind) for s in found.sites] == [("x" if kind == "layer_norm" else c.name, kind)]
    assert not found.refusals


@pytest.mark.parametrize(("before", "norm", "root"), [
    (lambda g: g.op("mul", g.x, g.c(3.0)), rms, "v"),  # eps would be another
    (lambda g: g.op("mul", g.x, g.c(3.0)), ln, "v"),
    (lambda g: g.op("neg", g.x), rms, "v"),
    (lambda g: g.op("add", g.x, g.c(1.0)), ln, "v"),
    (lambda g: g.op("mul", g.x, g.c(1.0)), rms, "x"),
    (lambda g: g.op("identity", g.x), rms, "x"),
    (lambda g: centred(g, g.x), rms, "x"),
    (lambda g: centred(g, g.x), ln, "x"),
    (lambda g: g.op("mul", centred(g, g.x), g.c(3.0)), rms, "x"),  # an RMSNorm of what is centred is a LayerNorm
    (lambda g: g.op("mul", centred(g, g.x), g.c(3.0)), ln, "v"),
    (lambda g: g.op("sub", g.x, g.op("mul", g.mean(g.x), g.c(0.5))), ln, "v"),
])  # fmt: skip
def test_which_of_two_tensors_a_norm_is_one_of(before: Spell, norm: Callable[[Build, Value], Value],
                                               root: str) -> None:  # fmt: skip
    g = Build()
    v = before(g)
    found = g.found(norm(g, v))
    (site,) = found.sites
    assert site.norm.x is (v if root == "v" else g.x)
    assert compare(found, g.graph) == 1


@pytest.mark.parametrize("nothing", [
    lambda g, n: g.op("mul", n, g.c(1.0)), lambda g, n: g.op("add", n, g.c(0.0)), lambda g, n: g.op("identity", n),
    lambda g, n: g.op("reshape", n, shape=("B", "S", 64)),
])  # fmt: skip
def test_a_norm_that_a_norm_reads_through_a_step_that_does_nothing(nothing: Callable[[Build, Value], Value]) -> None:
    g = Build()
    n = rms(g, g.x)
    y = nothing(g, n)
    second = rms(g, y)
    found = g.found(second)
    assert names(found) == [n.name, second.name] and found.sites[1].norm.x is n
    assert compare(found, g.graph) == 2


def test_a_norm_that_one_operator_reads_is_a_site() -> None:
    g = Build()
    n = g.op("mul", rms(g, g.x), g.w)
    second = g.op("rms_norm", n, axes=(2,), eps=1e-5)
    third = g.op("layer_norm", second, axes=(2,), eps=1e-5)
    found = g.found(third)
    assert [(site.value, site.norm.x) for site in found.sites] == [(n, g.x), (second, n), (third, second)]
    assert [site.is_op for site in found.sites] == [False, True, True]


def test_a_norm_that_nothing_reads_is_a_site() -> None:
    g = Build()
    n = rms(g, g.x)
    assert names(recognise(g.graph)) == [n.name]


def test_a_norm_of_a_transposed_tensor_is_its_own() -> None:
    g = Build((4, 6, 8))
    t = g.op("transpose", g.x, perm=(0, 2, 1), shape=(4, 8, 6))
    n = rms(g, t)
    (site,) = g.found(n).sites
    assert (site.value, site.norm.x, site.norm.axes) == (n, t, (2,))


def test_of_a_transposed_norm_no_part_is_taken_for_one_of_x() -> None:
    g = Build((4, 6, 8), dtype="float16")
    t = g.op("transpose", g.x, perm=(0, 2, 1), shape=(4, 8, 6))
    wide = g.op("cast", t, dtype="float32")
    n = g.op("cast", rms(g, wide), dtype="float16")
    y = g.op("transpose", g.op("cast", n, dtype="bfloat16"), perm=(0, 2, 1), shape=(4, 6, 8))
    (site,) = g.found(y).sites
    assert (site.value, site.norm.x, site.norm.cast) == (y, g.x, "mixed") and "cast twice" in site.mixed


def test_a_norm_in_a_view_is_a_norm_of_the_tensor_where_it_comes_back() -> None:
    g = Build((4, 6, 64))
    flat = g.op("reshape", g.x, shape=(24, 64))
    n = rms(g, flat, (1,))
    y = g.op("reshape", n, shape=(4, 6, 64))
    found = g.found(y)
    (site,) = found.sites
    assert (site.value, site.norm.x, site.norm.axes) == (y, g.x, (2,)) and compare(found, g.graph) == 1


def test_a_norm_over_an_inner_axis_behind_transposes() -> None:
    g = Build((4, 6, 8))
    t = g.op("transpose", g.x, perm=(0, 2, 1), shape=(4, 8, 6))
    n = rms(g, t)
    y = g.op("transpose", n, perm=(0, 2, 1), shape=(4, 6, 8))
    found = g.found(y)
    (site,) = found.sites
    assert (site.value, site.norm.x, site.norm.axes) in ((n, t, (2,)), (y, g.x, (1,)))
    assert compare(found, g.graph) == 1


Scale = Callable[[Build, Value], Value]


def turned(scale: Scale, axes: tuple[int, ...] = (3,), sizes: tuple[int, int, int] = (3, 4, 5)) -> tuple[Build, Value]:
    """Images with channels first; a norm of them with channels last, and back."""
    a, b, c = sizes
    g = Build((2, a, b, c))
    t = g.op("transpose", g.x, perm=(0, 2, 3, 1), shape=(2, b, c, a))
    return g, g.op("transpose", scale(g, rms(g, t, axes)), perm=(0, 3, 1, 2), shape=(2, a, b, c))


@pytest.mark.parametrize("shape", [(3,), (1, 3), (1, 1, 3)])
def test_a_norm_belongs_to_the_tensor_that_its_weight_lines_up_with(shape: tuple[int, ...]) -> None:
    for factor in (1, 2):
        g, y = turned(lambda g, n: g.op("mul", n, leaf(g, *shape, name="w", fixed=True)))
        out = y if factor == 1 else g.op("mul", y, g.c(2.0))
        found = g.found(out)
        (site,) = found.sites
        assert (site.norm.x.name, site.norm.axes, site.norm.size) == ("v0", (3,), 3) and compare(found, g.graph) == 1
        assert site.value.uses[0].kind == "transpose"


@pytest.mark.parametrize("shape", [(), (3, 1, 1), (1, 3, 1, 1)])
def test_a_norm_whose_weight_lines_up_with_the_first_tensor_is_of_that(shape: tuple[int, ...]) -> None:
    g, y = turned(lambda g, n: n)
    found = g.found(g.op("mul", y, leaf(g, *shape, name="w", fixed=True)))
    (site,) = found.sites
    assert (site.norm.x, site.norm.axes) == (g.x, (1,)) and compare(found, g.graph) == 1


@pytest.mark.parametrize("last", [True, False])
def test_a_weight_over_several_axes_lines_up_in_their_order(last: bool) -> None:
    """All three axes are of one size."""
    weigh: Scale = lambda g, n: g.op("mul", n, leaf(g, 3, 3, 3, name="w", fixed=True))  # noqa: E731
    g, y = turned((lambda g, n: n) if last else weigh, (1, 2, 3), (3, 3, 3))
    found = g.found(weigh(g, y) if last else y)
    (site,) = found.sites
    assert site.norm.x.name == ("x" if last else "v0") and site.norm.axes == (1, 2, 3)
    assert compare(found, g.graph) == 1


@pytest.mark.parametrize(("axes", "shape", "wide"), [
    ((1,), (3, 1, 1), (2, 3, 4, 5)), ((1,), (3, 1, 1), (2, 1, 4, 5)),  # spread along the axis of the weight, or not
    ((1, 2, 3), (3, 4, 5), (2, 1, 1, 5)), ((1, 2, 3), (3, 4, 1), (2, 1, 4, 1)), ((3,), (5,), (2, 3, 4, 5)),
])  # fmt: skip
def test_a_weight_beside_a_statistic_that_is_spread_lines_up(axes: tuple[int, ...], shape: tuple[int, ...],
                                                             wide: tuple[int, ...]) -> None:  # fmt: skip
    g = Build((2, 3, 4, 5))
    r = g.op("expand", rstd(g, g.x, axes), shape=wide)
    found = g.found(g.op("mul", g.x, g.op("mul", r, leaf(g, *shape, name="w", fixed=True))))
    (site,) = found.sites
    assert (site.norm.x, site.norm.axes) == (g.x, axes) and site.norm.weight is not None
    assert compare(found, g.graph) == 1


def test_a_weight_as_long_as_a_row_lines_up_with_its_axes() -> None:
    g = Build((2, 4, 5))
    n = rms(g, g.op("reshape", g.x, shape=(2, 20)), (1,))
    y = g.op("reshape", g.op("mul", n, leaf(g, 20, name="w", fixed=True)), shape=(2, 4, 5))
    (site,) = g.found(y).sites
    assert (site.value, site.norm.x, site.norm.axes) == (y, g.x, (1, 2))


def test_copies_after_a_norm_are_not_part_of_it() -> None:
    for kind, more in (("identity", {}), ("cast", {"dtype": "float32"}), ("cast", {"dtype": "float64"}),
                       ("reshape", {"shape": ("B", "S", 64)})):  # fmt: skip
        g = Build()
        n = rms(g, g.x)
        found = g.found(g.op(kind, n, **more))
        assert names(found) == [n.name], found.sites
    g = Build()
    n = rms(g, g.x)
    narrow = g.op("cast", n, dtype="float16")
    assert names(g.found(narrow)) == [narrow.name]


def test_a_copy_read_twice_is_one_site() -> None:
    g = Build()
    n = g.op("mul", rms(g, g.x), g.w)
    a, b = g.op("identity", n), g.op("identity", n)
    assert names(g.found(a, b)) == [n.name]


def test_a_site_is_called_after_its_last_node_that_is_no_copy() -> None:
    g = Build()
    n = rms(g, g.x)
    y = g.op("identity", n)
    assert [site.label for site in g.found(y).sites] == [n.name]
    g = Build()
    n = rms(g, g.op("transpose", g.x, perm=(1, 0, 2)))
    y = g.op("transpose", n, perm=(1, 0, 2))
    assert [(site.value, site.label) for site in g.found(y).sites] == [(y, n.name)]
    g = Build()
    n = rms(g, g.x)
    assert n.producer is not None
    n.producer.name = "node"
    assert [site.label for site in g.found(n).sites] == ["node"]
    n.producer.name = ""
    n.name = "value"
    assert [site.label for site in g.found(n).sites] == ["value"]


def test_a_row_sum_squared_beside_the_norm_is_no_norm() -> None:
    """x*rstd + (x*rstd)^2 is no norm; its summand is."""
    g = Build()
    n = rms(g, g.x)
    found = g.found(g.op("add", n, g.op("square", n)))
    assert names(found) == [n.name]


@pytest.mark.parametrize(("number", "weight"), [
    (1.0, None), (1.0 + 4e-7, None), (1.0 + 6e-7, 1.0 + 6e-7), (2.0, 2.0), (-1.0, -1.0), (1.0 - 4e-7, None),
    (1.0 - 6e-7, 1.0 - 6e-7),
])  # fmt: skip
def test_a_factor_that_is_one_but_for_rounding_is_none(number: float, weight: float | None) -> None:
    g = Build()
    (site,) = g.found(g.op("mul", rms(g, g.x), g.c(number))).sites
    ((c, factors),) = site.norm.weight or ((None, ()),)
    assert c == (None if weight is None else pytest.approx(weight, rel=1e-12)) and not factors
    assert site.norm.bias is None


def test_weight_and_bias_are_sums_of_products_of_parameters() -> None:
    g = Build()
    z = leaf(g, 64, fixed=True)
    n = g.op("add", g.op("mul", g.op("mul", rms(g, g.x), g.w), z), g.op("mul", rms(g, g.x), g.b))
    y = g.op("sub", g.op("add", n, g.c(2.0)), g.op("div", g.b, z))
    (site,) = g.found(y).sites
    norm = site.norm
    assert norm.weight == ((1.0, ((g.w, 1), (z, 1))), (1.0, ((g.b, 1),))) or set(norm.weight or ()) == {
        (1.0, ((g.b, 1),)), (1.0, ((g.w, 1), (z, 1)))}  # fmt: skip
    assert norm.bias is not None and len(norm.bias) == 2 and (2.0, ()) in norm.bias
    assert norm.size == 64 and norm.eps == pytest.approx(1e-5) and norm.dtype == "float32"
    assert compare(g.found(y), g.graph) == 1


@pytest.mark.parametrize("number", [1.0, -1.0, 2.0])
def test_a_bias_that_is_a_number(number: float) -> None:
    g = Build()
    (site,) = g.found(g.op("add", rms(g, g.x), g.c(number))).sites
    assert site.norm.bias == ((number, ()),)


def test_a_row_of_unknown_size_has_none() -> None:
    g = Build(("B", "S", "D"))
    (site,) = g.found(rms(g, g.x)).sites
    assert site.norm.size is None
    g = Build((4, 6, 64))
    (site,) = g.found(rms(g, g.x, (1, 2))).sites
    assert site.norm.size == 384
