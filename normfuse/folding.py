"""The weights and biases of norms in the linear layers behind them: the plan, and what becomes of constants."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace

from normfuse.centring import Channels
from normfuse.conversion import Conversion, Groups, rms
from normfuse.convert import Edits, Get
from normfuse.graph import Graph, Value
from normfuse.norm import Expr, Norm, Site, end_of
from normfuse.ort_values import Array
from normfuse.passes.fold_affine import Contraction, Linear, Readers, constants, elements


class Folder:
    """Plans what of the norms goes into the constants behind them: the bias, with `scale` the weight too.

    `linear`, `channels`, `twins`: as for the planner; `full` tells of a constant whether it is a number all over.
    """

    def __init__(self, graph: Graph, plan: Conversion, linear: Linear, channels: Channels,
                 twins: Callable[[Value], Hashable], full: Callable[[Value, int], bool]) -> None:  # fmt: skip
        self.plan, self.full = plan, full
        self.readers = Readers(graph, linear, channels, twins)

    def run(self, sites: Sequence[Site], scale: bool) -> None:
        """Fold what can be folded, of the converted norms and, with `scale`, of the other RMSNorms at `sites`."""
        converted = set(self.plan.sites)
        norms, readers = dict[Site, Norm](), dict[Site, list[Contraction]]()
        for site in dict.fromkeys([*self.plan.sites, *(sites if scale else ())]):
            if site in converted or (site.norm.kind == "rms_norm" and site not in self.plan.kept):
                inner = self.plan.inner.get(site, site)
                norms[site], readers[site] = self._without_zeros(rms(inner.norm)), self._readers(inner)
        for group in self._groups(readers):
            norms |= self._fold({site: norms[site] for site in group}, [readers[site] for site in group], scale)
        for site, norm in norms.items():
            inner = self.plan.inner.get(site, site)
            if (norm.bias, norm.weight) != (inner.norm.bias, inner.norm.weight):
                self.plan.folded[site] = replace(inner, norm=norm)

    def _without_zeros(self, norm: Norm) -> Norm:
        bias = constants(norm.bias)
        values = [v for _, factors in bias or () for v, _ in factors]
        if bias is None or len(bias) > 1 or not all(self.full(v, 0) for v in values):
            return norm
        self.plan.zero += values
        return replace(norm, bias=None)

    def _groups(self, readers: Mapping[Site, Sequence[Contraction]]) -> list[list[Site]]:
        """The norms whose readers share constants, together."""
        groups, out = Groups(), dict[object, list[Site]]()
        for site, found in readers.items():
            for key in (key for one in found for key in self.readers.keys(one)):
                groups.join(site, key)
        for site in readers:
            out.setdefault(groups.of(site), []).append(site)
        return list(out.values())

    def _fold(self, norms: dict[Site, Norm], readers: list[list[Contraction]], scale: bool) -> dict[Site, Norm]:
        """Fold what norms with the same weight and bias have into the layers that read them; the norms then."""
        own = {(norm.bias is None, constants(norm.bias), constants(norm.weight)) for norm in norms.values()}
        (none, bias, weight), *others = own
        layers = [one for found in readers for one in found]
        copied = any(v in self.plan.copies for one in layers for v in (one.weight, one.bias))  # some have another then
        if others or copied or not all(readers) or not self.readers.alone(layers):
            return norms
        if bias is not None and all(one.bias is not None for one in layers):
            self.plan.folds += [("bias", bias, found) for found in readers]
            norms, none = {site: replace(norm, bias=None) for site, norm in norms.items()}, True
        if scale and none and weight is not None and not self._ones(weight):
            self.plan.folds += [("scale", weight, found) for found in readers]
            norms = {site: replace(norm, weight=None) for site, norm in norms.items()}
        return norms

    def _ones(self, weight: Expr) -> bool:
        """Whether a weight has nothing to fold: it was folded before, and the operator has to have one."""
        return [c for c, _ in weight] == [1] and all(self.full(v, 1) for _, factors in weight for v, _ in factors)

    def _readers(self, site: Site) -> list[Contraction]:
        axes = site.norm.axes
        return self.readers.of(end_of(site.value), axes[0]) or [] if len(axes) == 1 else []


def folds_note(plan: Conversion) -> list[str]:
    """What to say of folded biases and weights."""
    out = []
    for kind, name in (("bias", "biases"), ("scale", "weights")):
        n = sum(k == kind for k, _, _ in plan.folds)
        if n:
            out.append(f"the {name} of {n} norms went into the linear layers behind them")
    return out


def fold(plan: Conversion, edits: Edits, name: Callable[[Value], str]) -> None:
    """Write the planned folds down as edits of constants: biases first, since they read weights as they are then; a
    layer once that reads several norms."""
    done = set[tuple[str, Value]]()

    def made_of(expr: Expr, size: int) -> Callable[[Get], Array]:
        return lambda give: elements(expr, size, lambda v: give(name(v)))

    for kind, expr, found in sorted(plan.folds, key=lambda f: f[0]):
        for one in found:
            if (kind, one.weight) in done:
                continue
            done.add((kind, one.weight))
            size = (one.weight.shape or ())[one.over]
            assert isinstance(size, int)
            if kind == "scale":
                edits.scale(name(one.weight), made_of(expr, size), one)
            elif one.bias is not None:
                edits.add_product(name(one.bias), name(one.weight), made_of(expr, size), one)
