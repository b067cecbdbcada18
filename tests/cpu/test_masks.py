"""Masks refuse parameters that are no positions, and are named without printing their tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexattn import masks, not_mask


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masks.causal(1.5), r"offset must be an int, or an integer tensor: 0-d, or \[B\]; got 1.5"),  # type: ignore[arg-type]
        (lambda: masks.causal(torch.tensor(True)), "offset must be .* got a torch.bool tensor"),
        (lambda: masks.prefix_lm(torch.ones(2, 2).long()), r"prefix_length must .* got a torch.int64 tensor \[2, 2\]"),
        (lambda: masks.padding(torch.rand(3)), r"lengths must be an integer tensor \[B\]; got a torch.float32 tensor"),
        (lambda: masks.padding(torch.tensor(3)), "lengths must be an integer tensor"),
        (lambda: masks.padding(3), "lengths must be an integer tensor"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_position_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_name_gives_the_shape_of_a_tensor_and_not_its_values() -> None:
    lengths = torch.tensor([5, 9])
    assert repr(not_mask(masks.padding(lengths))) == "not_mask(padding(lengths=tensor[2]))"
    assert masks.prefix_lm(lengths).__name__ == "prefix_lm(prefix_length=tensor[2])"
    assert masks.causal(torch.tensor(3)).__name__ == "causal(offset=tensor[])"
    assert masks.window(2, 1).__name__ == "window(left=2, right=1)"
