"""The SVG picture of a block mask: the grid of blocks, the blocks visited by each row, and the elements of one block.

Groups and rectangles say in `data-` attributes what they are; inside a panel, lengths are elements (in the row strip,
blocks across).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.sax.saxutils import escape

from .block_mask_cells import COLORS, EMPTY, FULL, KINDS, MEANINGS, PARTIAL, Block, Cells, View, ticks, view

if TYPE_CHECKING:
    from .block_mask import BlockMask

# Pixels.
_LONG, _SHORT = 420, 48  # the longer side of a panel; no side is shorter than the other
_LEFT, _TOP, _GAP, _STRIP, _MARGIN = 84, 56, 40, 72, 24
_LEGEND, _LINE, _TICK = 200, 20, 64  # width of an entry, height of a line, least distance of labels
_MOST_LINES = 64  # cells a side up to which they are told apart by lines

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def svg(
    mask: BlockMask,
    batch: int = 0,
    head: int = 0,
    zoom: Any = None,
    max_cells: int = 128,
    title: str | None = None,
) -> str:
    """A picture of one batch entry and head of a mask as a self-contained SVG document.

    Args:
        mask: the mask.
        batch, head: which one; 0 where the mask is the same for all.
        zoom: (row, column) of a block whose elements are drawn beside the grid; "auto" for the first partial block, if
            there is one; or None.
        max_cells: cells a side. A mask of more blocks is drawn in cells of several, paler the fewer of them are visited.
        title: the heading. Default: the name of the mask function.

    Raises:
        IndexError: for a batch, head or block that the mask does not have.
        ValueError: for arguments of another form.
    """
    shown = view(mask, batch, head, zoom, max_cells)
    heading = shown.name if title is None else title
    grid = _Panel.of(_LEFT, shown.seq_lengths)
    strip = _Panel(grid.right + _GAP, _STRIP, grid.height)
    parts = [*_grid(shown, grid), *_strip(shown, strip)]
    right, bottom = strip.right, grid.bottom
    if shown.zoom is not None:
        panel = _Panel.of(strip.right + _GAP + _LEFT, _lengths(shown.zoom.elements))
        parts += _elements(shown.zoom, panel)
        right, bottom = max(panel.right, panel.x + 7 * len(shown.zoom.caption)), max(bottom, panel.bottom)
    legend = bottom + 60
    parts += _legend(shown, legend)
    width = max(right, _MARGIN + len(KINDS) * _LEGEND) + _MARGIN
    height = legend + _LINE * (2 if shown.note else 1)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_number(width)}" height="{_number(height)}" '
            f'viewBox="0 0 {_number(width)} {_number(height)}" font-family="sans-serif" font-size="12" role="img">',
            f"<title>{_escaped(heading)}</title>",
            '<rect width="100%" height="100%" fill="#FFFFFF"/>',
            _text(_MARGIN, 20, heading, "font-size='14' font-weight='bold' data-part='heading'"),
            _text(_MARGIN, 38, shown.facts, "data-part='facts'"),
            *parts,
            "</svg>",
            "",
        ]
    )


class _Panel(NamedTuple):
    """Where something is drawn, in pixels; all panels have the same top."""

    x: float
    width: float
    height: float

    @classmethod
    def of(cls, x: float, lengths: tuple[int, int]) -> _Panel:
        """A panel in the proportions of (queries, keys), but not too thin to be seen."""
        height, width = (max(_SHORT, _LONG * n / max(*lengths, 1)) for n in lengths)
        return cls(x, width, height)

    @property
    def right(self) -> float:
        return self.x + self.width

    @property
    def bottom(self) -> float:
        return _TOP + self.height

    def scaled(self, part: str, across: float, down: float) -> str:
        """The start of a group in which so many units across and down fill the panel."""
        scale = f"scale({self.width / max(across, 1):.12g} {self.height / max(down, 1):.12g})"
        return f'<g data-part="{part}" transform="translate({_number(self.x)} {_TOP}) {scale}" shape-rendering="crispEdges">'


def _grid(shown: View, panel: _Panel) -> list[str]:
    Q, KV = shown.seq_lengths
    parts = [panel.scaled("blocks", KV, Q), *_cells(shown.blocks), "</g>", *_lines(shown.blocks, panel)]
    if shown.zoom is not None:
        parts += _mark(shown.zoom, panel, shown.seq_lengths)
    return [*parts, *_axes(panel, (0, 0), shown.seq_lengths, shown.block_size)]


def _mark(block: Block, panel: _Panel, lengths: tuple[int, int]) -> list[str]:
    """A frame around a block of the grid: white around black, seen on every colour and however small the block is."""
    (q, kv), (height, width) = _starts(block.elements), _lengths(block.elements)
    down, across = panel.height / lengths[0], panel.width / lengths[1]
    sides = {"x": panel.x + kv * across, "y": _TOP + q * down, "width": width * across, "height": height * down}
    rect = "<rect " + " ".join(f'{name}="{_number(value)}"' for name, value in sides.items())
    lines = (
        f'{rect} fill="none" stroke="{color}" stroke-width="{w}"/>' for color, w in (("#FFFFFF", 4), ("#000000", 2))
    )
    return ['<g data-part="mark">', *lines, "</g>"]


def _elements(block: Block, panel: _Panel) -> list[str]:
    lengths = _lengths(block.elements)
    return [
        panel.scaled("elements", lengths[1], lengths[0]),
        *_cells(block.elements),
        "</g>",
        *_lines(block.elements, panel),
        _text(panel.x, _TOP - 6, block.caption, "data-part='caption'"),
        *_axes(panel, _starts(block.elements), lengths, (1, 1)),
    ]


def _strip(shown: View, panel: _Panel) -> list[str]:
    """How many blocks a row visits, partial and then full, as bars."""
    partial, full = (counts.tolist() for counts in shown.visited_by_row())
    most = max((p + f for p, f in zip(partial, full, strict=True)), default=0)
    edges = shown.blocks.q_edges
    rects = defaultdict(list)
    for top, bottom, p, f in zip(edges, edges[1:], partial, full, strict=False):
        for kind, start, length in ((PARTIAL, 0, p), (FULL, p, f)):
            if length:
                rects[kind].append(_rect(start, top, length, bottom - top))
    return [
        panel.scaled("rows", most, shown.seq_lengths[0]),
        *(line for kind in rects for line in _group(kind, 1.0, rects[kind])),
        "</g>",
        _text(panel.x, panel.bottom + 16, "0"),
        _text(panel.right, panel.bottom + 16, f"{most:.4g}", "text-anchor='end' data-part='most'"),
        _text(panel.x + panel.width / 2, panel.bottom + 34, "blocks a row", "text-anchor='middle'"),
    ]


def _cells(cells: Cells) -> list[str]:
    """Rectangles in elements from the upper left corner; equal neighbours in a row are one. What is empty is background."""
    (q_start, kv_start), (height, width) = _starts(cells), _lengths(cells)
    across = [at - kv_start for at in cells.kv_edges]
    down = [at - q_start for at in cells.q_edges]
    rects: dict[tuple[int, float], list[str]] = defaultdict(list)
    rows = zip(down, down[1:], cells.kind.tolist(), cells.opacity.tolist(), strict=False)
    for top, bottom, kinds, opacities in rows:
        styles = [(kind, round(opacity, 2)) for kind, opacity in zip(kinds, opacities, strict=True)]
        for style, run in groupby(range(len(styles)), key=styles.__getitem__):
            first, *rest = run
            left, right = across[first], across[(rest or [first])[-1] + 1]
            if style[0] != EMPTY:
                rects[style].append(_rect(left, top, right - left, bottom - top))
    drawn = [*_group(EMPTY, 1.0, [_rect(0, 0, width, height)])]
    drawn += [line for style in sorted(rects) for line in _group(*style, rects[style])]
    return drawn


def _lines(cells: Cells, panel: _Panel) -> list[str]:
    """Lines between few cells. In pixels: not every program leaves the width of a line alone when it scales a group."""
    (q_start, kv_start), (height, width) = _starts(cells), _lengths(cells)
    if max(cells.things.shape) > _MOST_LINES:
        return []
    xs = (panel.x + (at - kv_start) * panel.width / width for at in cells.kv_edges[1:-1])
    ys = (_TOP + (at - q_start) * panel.height / height for at in cells.q_edges[1:-1])
    path = "".join(f"M{_number(x)} {_TOP}V{_number(panel.bottom)}" for x in xs)
    path += "".join(f"M{_number(panel.x)} {_number(y)}H{_number(panel.right)}" for y in ys)
    return [f'<path d="{path}" stroke="#FFFFFF" stroke-width="0.5" fill="none"/>']


def _axes(panel: _Panel, starts: Sequence[int], lengths: Sequence[int], units: Sequence[int]) -> list[str]:
    """Positions of elements along the left and the lower side."""
    parts = []
    scale = panel.width / max(lengths[1], 1)
    for at in ticks(starts[1], starts[1] + lengths[1], units[1], max(1, int(panel.width // _TICK))):
        x = panel.x + (at - starts[1]) * scale
        parts.append(_text(x, panel.bottom + 16, str(at), "text-anchor='middle' data-axis='keys'"))
    scale = panel.height / max(lengths[0], 1)
    for at in ticks(starts[0], starts[0] + lengths[0], units[0], max(1, int(panel.height // _TICK))):
        y = _TOP + (at - starts[0]) * scale
        parts.append(_text(panel.x - 6, y + 4, str(at), "text-anchor='end' data-axis='queries'"))
    x, y = panel.x - 66, _TOP + panel.height / 2
    turned = f"text-anchor='middle' transform='rotate(-90 {_number(x)} {_number(y)})'"
    parts.append(_text(x, y, "queries", turned))
    parts.append(_text(panel.x + panel.width / 2, panel.bottom + 34, "keys", "text-anchor='middle'"))
    return parts


def _legend(shown: View, y: float) -> list[str]:
    parts = ['<g data-part="legend">']
    for i, (color, meaning) in enumerate(zip(COLORS, MEANINGS, strict=True)):
        x = _MARGIN + i * _LEGEND
        box = f'<rect x="{x}" y="{_number(y - 10)}" width="12" height="12" fill="{color}" stroke="#808080"/>'
        parts += [box, _text(x + 18, y, meaning)]
    if shown.note:
        parts.append(_text(_MARGIN, y + _LINE, shown.note, "data-part='note'"))
    return [*parts, "</g>"]


def _starts(cells: Cells) -> tuple[int, int]:
    return cells.q_edges[0], cells.kv_edges[0]


def _lengths(cells: Cells) -> tuple[int, int]:
    return cells.q_edges[-1] - cells.q_edges[0], cells.kv_edges[-1] - cells.kv_edges[0]


def _group(kind: int, opacity: float, rects: list[str]) -> list[str]:
    faint = f' fill-opacity="{opacity:g}"' if opacity != 1 else ""
    return [f'<g data-kind="{KINDS[kind]}" fill="{COLORS[kind]}"{faint}>', *rects, "</g>"]


def _rect(x: float, y: float, width: float, height: float) -> str:
    return f'<rect x="{_number(x)}" y="{_number(y)}" width="{_number(width)}" height="{_number(height)}"/>'


def _text(x: float, y: float, text: str, attributes: str = "") -> str:
    return f'<text x="{_number(x)}" y="{_number(y)}" fill="#222222" {attributes}>{_escaped(text)}</text>'


def _escaped(text: str) -> str:
    return escape(_NOT_XML.sub("\ufffd", text))


def _number(x: float) -> str:
    return str(x) if isinstance(x, int) else f"{x:.3f}".rstrip("0").rstrip(".")
