"""The benchmark of AutoModel's architectures counts what is there."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import masking_utils

import normfuse
from tests.bench import auto_models


@pytest.mark.parametrize(("kind", "norms", "more"), [
    # linear attention in chunks, written in place; query and key normalised by a function
    pytest.param("qwen3_next", 14, 6, marks=pytest.mark.slow),
    ("falcon_h1", 9, 0),  # a norm that two readers scale is one
])  # fmt: skip
def test_all_norms_of_an_architecture(kind: str, norms: int, more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda *_, **__: None)
    found = auto_models.look(kind)
    assert found == {"norms": norms, "found": norms, "more": more, "missing": []}


def test_a_norm_that_is_not_found_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda *_, **__: None)
    inspect = normfuse.inspect

    def less(program: Any) -> normfuse.Report:
        report = inspect(program)
        report.norms[:] = [norm for norm in report.norms if norm.module != "layers.1.input_layernorm"]
        return report

    monkeypatch.setattr(normfuse, "inspect", less)
    assert auto_models.look("llama") == {"norms": 9, "found": 8, "more": 0,
                                         "missing": ["LlamaRMSNorm layers.1.input_layernorm"]}  # fmt: skip
