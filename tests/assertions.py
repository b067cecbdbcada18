"""Checks with derived tolerances."""

from __future__ import annotations

import torch
from torch import Tensor

from flexattn.testing.verdict import excess

EPSILON = {t: torch.finfo(t).eps for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def assert_within_budget(
    actual: Tensor,
    exact: Tensor,
    plain: Tensor,
    name: str,
    stored: torch.dtype,
    magnitude: float = 0.0,
    factor: float = 3.0,
    terms: int = 1,
) -> None:
    """`actual` is as close to `exact` (float64) as a plain implementation of the same precision, up to a factor.

    The budget of an element is `factor` times the error of `plain`, which counts as at least one rounding of the
    `stored` dtype at the largest magnitude: a plain implementation can be exact by luck. For an output, `stored` is its own
    dtype; for a gradient it is that of the attention's output, from which delta = rowsum(dO * O) is computed.
    `magnitude` is that of the terms which may cancel in the result, where it exceeds the result's own.
    For float64 nothing is more exact to measure `plain` against: the bound of a sum of `terms` takes its place.
    """
    actual, exact, plain = (t.detach().to(torch.float64) for t in (actual, exact, plain))
    assert actual.shape == exact.shape == plain.shape, f"{name}: shapes {actual.shape}, {exact.shape}"
    assert torch.equal(torch.isnan(actual), torch.isnan(exact)), f"{name}: nan in other places"
    infinite = torch.isinf(exact)
    assert torch.equal(actual[infinite], exact[infinite]), f"{name}: infinities differ"
    finite = torch.isfinite(exact)
    if not finite.any():
        return
    usable = finite & torch.isfinite(plain)
    worst_plain = (plain - exact)[usable].abs().max().item() if usable.any() else 0.0
    floor = EPSILON[stored] * max(exact[finite].abs().max().item(), magnitude)
    if stored is torch.float64:
        floor *= terms
    error = (actual - exact)[finite].abs().max().item()
    budget = factor * max(worst_plain, floor)
    assert error <= budget, f"{name}: error {error:.3e} where {budget:.3e} is allowed (plain: {worst_plain:.3e})"


def assert_within(name: str, found: Tensor, exact: Tensor, allowed: Tensor) -> None:
    """No element is off by more than its budget, and nan and infinity are where they should be."""
    assert found.shape == exact.shape == allowed.shape, f"{name}: shapes {found.shape}, {exact.shape}, {allowed.shape}"
    worst = excess(name, found, exact, allowed)
    assert worst is None, f"{worst}, {worst.ratio} times its budget" if worst else ""


def assert_same(actual: Tensor, expected: Tensor, name: str = "", ulps: float = 8) -> None:
    """Equal up to a few roundings of the operations involved; exactly equal for integers and booleans."""
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype} instead of {expected.dtype}"
    actual, expected = torch.broadcast_tensors(actual, expected)
    if not actual.dtype.is_floating_point:
        assert torch.equal(actual, expected), f"{name}: values differ"
        return
    epsilon = EPSILON[actual.dtype]
    torch.testing.assert_close(
        actual, expected, rtol=ulps * epsilon, atol=ulps * epsilon, equal_nan=True, msg=name or None
    )
