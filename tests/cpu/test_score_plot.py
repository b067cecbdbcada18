"""What matplotlib is given to draw of scores and masks is compared with their values."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from matplotlib import pyplot
from matplotlib.colors import to_rgb
from torch import Tensor

import flexattn
from flexattn import create_block_mask, create_mask, masks, plot_mask, plot_scores, score_plot
from flexattn.block_mask_cells import COLORS, EMPTY, FULL
from flexattn.score_plot import HIDDEN, NOT_FINITE


@pytest.fixture(autouse=True)
def _no_window() -> Iterator[None]:
    pyplot.switch_backend("Agg")
    yield
    pyplot.close("all")


def qkv(H: int = 4, Hkv: int = 2, L: int = 40, S: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, H, L, 8), torch.randn(2, Hkv, S, 8), torch.randn(2, Hkv, S, 8)


def image_of(ax: Any) -> Tensor:
    (image,) = ax.images
    return torch.as_tensor(image.get_array())


def color(text: str) -> list[int]:
    return [round(255 * c) for c in to_rgb(text)]


def bar_of(ax: Any) -> Any:
    (bar,) = [other for other in ax.figure.axes if other is not ax]
    return bar


def shade(values: Tensor, ax: Any, gamma: float = 1.0) -> Tensor:
    """Values as the colours that the bar beside the picture gives them."""
    low, high = bar_of(ax).get_ylim()
    share = ((values - low) / (high - low)).clamp(0, 1) ** gamma
    return torch.as_tensor(matplotlib.colormaps["viridis"](share.numpy(), bytes=True))[..., :3]


def test_plot_scores_takes_what_inspect_takes_and_passes_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {n: p for n, p in signature(plot_scores).parameters.items() if n not in ("what", "ax")}
    assert taken == dict(signature(flexattn.inspect).parameters)

    def receive(*arguments: Any, **named: Any) -> None:
        assert signature(flexattn.inspect).bind(*arguments, **named).arguments == {name: name for name in taken}
        raise InterruptedError

    monkeypatch.setattr(score_plot, "inspect", receive)
    with pytest.raises(InterruptedError):
        plot_scores(**{name: name for name in taken})  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["weight", "score", "modified"])
def test_a_picture_shows_values_where_the_mask_attends_and_greys_elsewhere(what: Any) -> None:
    q, k, v = qkv()
    block_mask = create_block_mask(masks.sliding_window(9), None, None, 40, 50, "cpu", 16)
    given: dict[str, Any] = {"block_mask": block_mask, "enable_gqa": True, "b": 1, "h": 3}
    ax = plot_scores(q, k, v, flexattn.mods.softcap(2.0), what=what, **given)
    found = flexattn.inspect(q, k, v, flexattn.mods.softcap(2.0), **given)
    image, values = image_of(ax), getattr(found, what)
    empty = found.block == EMPTY
    assert bool(empty.any()) and bool((~found.mask & ~empty).any())
    assert {tuple(c) for c in image[empty].tolist()} == {tuple(color(COLORS[EMPTY]))}
    assert {tuple(c) for c in image[~found.mask & ~empty].tolist()} == {tuple(color(HIDDEN))}
    wanted = shade(values, ax, 0.5 if what == "weight" else 1.0)
    assert (image.int() - wanted.int())[found.mask].abs().max() <= 1
    ends = (0.0 if what == "weight" else values[found.mask].min().item(), values[found.mask].max().item())
    assert bar_of(ax).get_ylim() == pytest.approx(ends)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("keys", "queries")
    assert ax.get_title() == "batch 1, head 3, softcap(cap=2.0), sliding_window(size=9)"
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["hidden by the mask", "in a skipped block"]
    ax.figure.canvas.draw()


def test_no_shade_of_a_value_is_a_grey() -> None:
    shades = torch.as_tensor(matplotlib.colormaps["viridis"](torch.linspace(0, 1, 256).numpy(), bytes=True))[
        :, :3
    ].int()
    for text in (HIDDEN, COLORS[EMPTY], NOT_FINITE):
        assert (shades - torch.tensor(color(text))).abs().sum(-1).min() > 100


def test_a_score_of_minus_infinity_is_hidden_and_one_that_is_nan_is_red() -> None:
    q, k, v = qkv(Hkv=4)
    mod = lambda s, b, h, i, j: torch.where(j == 3, -torch.inf, torch.where((i == 2) & (j == 4), torch.nan, s))
    for what in ("weight", "modified"):
        ax = plot_scores(q, k, v, mod, what=what, q_idx=range(4))
        image = image_of(ax)
        red = (image == torch.tensor(color(NOT_FINITE))).all(-1)
        hidden = (image == torch.tensor(color(HIDDEN))).all(-1)
        assert hidden.nonzero().tolist() == [[i, 3] for i in range(4)]
        assert red.any(1).tolist() == [False, False, True, False] and bool(red[2, 4])
        assert ax.get_legend().get_texts()[-1].get_text() == "nan or infinite"


def test_chosen_positions_label_the_axes() -> None:
    q, k, v = qkv(Hkv=4)
    ax = plot_scores(q, k, v, q_idx=7, kv_idx=[40, 2, -1])
    assert image_of(ax).shape == (1, 3, 3)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["40", "2", "49"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["7"]
    ax = plot_scores(q, k, q_idx=slice(8, 40))
    labels = {at: int(t.get_text()) for at, t in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)}
    assert len(labels) > 2 and all(position == at + 8 for at, position in labels.items())


@pytest.mark.parametrize(("L", "S"), [(0, 0), (0, 5), (5, 0), (1, 1), (1, 400)])
def test_short_and_empty_sequences_are_drawn(L: int, S: int) -> None:
    q, k, v = qkv(Hkv=4, L=L, S=S)
    ax = plot_scores(q, k, v, mask_mod=masks.causal_mask)
    ax.figure.canvas.draw()
    assert len(ax.images) == (L * S > 0)


def test_given_axes_are_drawn_into_and_no_figure_is_made() -> None:
    figure = matplotlib.figure.Figure()
    left, right = figure.subplots(1, 2)
    assert plot_scores(*qkv(Hkv=4), ax=left) is left
    assert plot_mask(masks.causal_mask, 16, ax=right) is right
    assert len(left.images) == 1 and len(right.collections) == 1
    assert pyplot.get_fignums() == []
    assert plot_scores(*qkv(Hkv=4)).figure is pyplot.figure(pyplot.get_fignums()[0])


# ---- masks


def by_head(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (q_idx + 3 * h >= kv_idx) & (kv_idx != b)


def colors_of(ax: Any) -> Tensor:
    (mesh,) = ax.collections
    return torch.as_tensor(mesh.get_array())


@pytest.mark.parametrize("shape", [20, (20, 30), (2, 3, 20, 30)])
def test_a_mask_is_drawn_element_by_element(shape: Any) -> None:
    ax = plot_mask(by_head, shape, b=1, h=2)
    L, S = (shape, shape) if isinstance(shape, int) else shape[-2:]
    dense = create_mask(by_head, 2, 3, L, S, "cpu")[1, 2]
    table = torch.tensor([to_rgb(c) for c in COLORS], dtype=torch.float64)
    torch.testing.assert_close(colors_of(ax), table[torch.where(dense, FULL, EMPTY)], rtol=0, atol=1e-6)
    share = 100 * dense.double().mean().item()
    assert ax.get_title() == f"by_head, batch 1, head 2\n{L} × {S} elements, {share:.4g} % attended"
    assert ax.get_xlim() == (0, S) and ax.get_ylim() == (L, 0)


def test_a_large_mask_is_drawn_in_cells() -> None:
    ax = plot_mask(masks.causal_mask, 2000)
    assert colors_of(ax).shape == (512, 512, 3)
    assert ax.get_title() == "causal_mask\n2000 × 2000 elements, 50.02 % attended"


def test_a_block_mask_is_drawn_as_by_its_plot() -> None:
    mask = create_block_mask(by_head, 2, 3, 64, 64, "cpu", 16)
    ours, theirs = plot_mask(mask, b=1, h=2), mask.plot(1, 2)
    assert torch.equal(colors_of(ours), colors_of(theirs)) and ours.get_title() == theirs.get_title()


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1)])
def test_masks_of_few_elements_are_drawn(shape: tuple[int, int]) -> None:
    ax = plot_mask(masks.causal_mask, shape)
    ax.figure.canvas.draw()
    assert len(ax.collections) == (0 not in shape)


def test_bad_arguments_say_what_to_write_instead() -> None:
    block_mask = create_block_mask(masks.causal_mask, None, None, 16, 16, "cpu")
    for call, error, message in (
        (
            lambda: plot_mask(masks.causal_mask),
            ValueError,
            r"say what to draw: plot_mask\(mask_mod, \(Q_LEN, KV_LEN\)\)",
        ),
        (lambda: plot_mask(masks.causal_mask, (1, 2, 3)), ValueError, r"shape is \(1, 2, 3\); give a length"),
        (lambda: plot_mask(block_mask, 16), ValueError, "has its own"),
        (lambda: plot_mask(torch.ones(2, 2), 16), TypeError, "pass a function"),
        (
            lambda: plot_mask(masks.causal_mask, 1 << 20),
            ValueError,
            r"Draw the blocks instead: plot_mask\(create_block_mask",
        ),
        (lambda: plot_mask(masks.causal_mask, (1, 1, 8, 8), h=1), IndexError, "head 1 is out of range"),
        (lambda: plot_mask(masks.causal_mask, 8, h=-1), IndexError, "head -1 is out of range"),
        (lambda: plot_scores(*qkv(Hkv=4), what="weights"), ValueError, "what is 'weights'; choose one of 'weight'"),
        (lambda: plot_scores(*qkv(Hkv=4), q_idx=40), IndexError, "q_idx=40"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert pyplot.get_fignums() == []


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    for call in (lambda: plot_scores(*qkv(Hkv=4)), lambda: plot_mask(masks.causal_mask, 8)):
        with pytest.raises(ImportError, match=r"pip install 'flexattn\[plot\]'"):
            call()


def test_matplotlib_is_not_imported_with_the_package() -> None:
    source = Path(score_plot.__file__).read_text()
    assert not re.search(r"^\s*(import|from) matplotlib", source, re.MULTILINE)
