"""Placement of the names of points in a plot, without overlaps."""

from collections.abc import Sequence

_WIDTH, _HEIGHT = 330.0, 240.0  # size of a plot on a phone in pixels, where there is least room
_LETTER, _LINE, _GAP = 6.3, 14.0, 6.0
_SIDES = (("top", "right"), ("top", "left"), ("bottom", "right"), ("bottom", "left"))

Box = tuple[float, float, float, float]  # left, right, low, high


def place(points: Sequence[tuple[float, float]], names: Sequence[str]) -> list[str | None]:
    """Choose the place of each name, as Plotly's `textposition`; None if there is no room, so that only hovering shows it.

    Args:
        points: Positions as fractions of the plot's width and height.
        names: Names of the points.
    """
    centres = [(x * _WIDTH, y * _HEIGHT) for x, y in points]
    taken: list[Box] = [(x - _GAP, x + _GAP, y - _GAP, y + _GAP) for x, y in centres]
    found: list[str | None] = []
    for n, ((x, y), name) in enumerate(zip(centres, names, strict=True)):
        others = taken[:n] + taken[n + 1 :]
        boxes = {f"{high} {side}": _box(x, y, name, high, side) for high, side in _SIDES}
        free = [where for where, box in boxes.items() if _inside(box) and not any(_overlap(box, one) for one in others)]
        found.append(free[0] if free else None)
        if free:
            taken.append(boxes[free[0]])
    return found


def _box(x: float, y: float, name: str, high: str, side: str) -> Box:
    length = _LETTER * len(name)
    left = x + _GAP if side == "right" else x - _GAP - length
    low = y + 2 if high == "top" else y - 2 - _LINE
    return left, left + length, low, low + _LINE


def _inside(box: Box) -> bool:
    return box[0] >= 0 and box[1] <= _WIDTH and box[2] >= 0 and box[3] <= _HEIGHT + _LINE


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]
