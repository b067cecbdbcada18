"""Attention on several processes equals attention on one. The scenarios are in tests/ranks_dtensor.py and ranks_models.py."""

from __future__ import annotations

import pytest
import torch
from ranks import failures, named

pytestmark = pytest.mark.feature("FSDP2, DDP and DTensor on gloo, 2 and 4 processes")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch was built without torch.distributed")
@pytest.mark.parametrize("world", [2, 4])
def test_every_rank_agrees_with_one_process(world: int) -> None:
    names = named(world)
    assert names
    failed = failures(world, names)
    assert not failed, failed
