"""How much of a long list the tests take by default."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def share(cases: Iterable[Any], of: int, turn: int = 0) -> list[Any]:
    """The cases, each a value or a tuple of them, as parameters: one in `of` by default, all of them if slow ones too.

    Tests of the same list take other turns, so that together they see all of it.
    """
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)),
                         marks=() if i % of == turn else pytest.mark.slow)
            for i, case in enumerate(cases)]  # fmt: skip
