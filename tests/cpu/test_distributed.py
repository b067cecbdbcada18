"""Attention on several processes equals attention on one. The scenarios are in tests/ranks_*.py."""

from __future__ import annotations

import pytest
from ranks import failures


@pytest.mark.parametrize(("scenarios", "world"), [("ranks_dtensor", 2), ("ranks_dtensor", 4)])
def test_every_rank_agrees_with_one_process(scenarios: str, world: int) -> None:
    failed = failures(scenarios, world)
    assert not failed, failed
