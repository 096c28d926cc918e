"""A scatter plot as SVG: sizes against losses, one mark and colour for each series, with a name at each point."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 520, 70, 30, 40, 50  # pixels
COLOURS = ("#1b6ca8", "#c0504d", "#4f8f3a", "#8064a2", "#a8791b")
RADIUS, LETTERS = 5, 11
STEPS, MOST_TICKS = (0.25, 0.5, *(digit * 10.0**power for power in range(9) for digit in (1, 2, 5))), 14

Point = tuple[float, float, str]  # size, loss, name


def scatter(series: Mapping[str, Sequence[Point]], title: str, across: str, up: str) -> str:
    """The text of an SVG file; losses on a logarithmic axis.

    Args:
        series: Points by the name of what they have in common.
        title: Above the plot.
        across: Meaning of a size.
        up: Meaning of a loss.
    """
    points = [point for some in series.values() for point in some]
    low, high = min(x for x, _, _ in points), max(x for x, _, _ in points)
    margin = 0.08 * (high - low or 1.0)
    least, most = (math.log(bound(y for _, y, _ in points)) for bound in (min, max))
    room = 0.1 * (most - least or 1.0)

    def place(x: float, y: float) -> tuple[float, float]:
        right = (x - low + margin) / (high - low + 2 * margin)
        down = (most + room - math.log(y)) / (most - least + 2 * room)
        return LEFT + right * (WIDTH - LEFT - RIGHT), TOP + down * (HEIGHT - TOP - BOTTOM)

    drawn = [_text(WIDTH / 2, TOP / 2, title, "middle", 15), _text(WIDTH / 2, HEIGHT - 12, across, "middle")]
    drawn.append(f'<g transform="rotate(-90 16 {HEIGHT / 2})">{_text(16, HEIGHT / 2, up, "middle")}</g>')
    for value in _ticks(low, high):
        x, _ = place(value, math.exp(least))
        drawn.append(_line(x, TOP, x, HEIGHT - BOTTOM) + _text(x, HEIGHT - BOTTOM + 16, f"{value:g}", "middle"))
    for value in _round_numbers(math.exp(least), math.exp(most)):
        _, y = place(low, value)
        drawn.append(_line(LEFT, y, WIDTH - RIGHT, y) + _text(LEFT - 6, y + 4, f"{value:g}", "end"))
    for number, (name, some) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        drawn.append(f'<circle cx="{WIDTH - RIGHT - 190}" cy="{TOP + 14 + 18 * number}" r="{RADIUS}" fill="{colour}"/>')
        drawn.append(_text(WIDTH - RIGHT - 178, TOP + 18 + 18 * number, name))
        for x, y, label in some:
            at, height = place(x, y)
            drawn.append(f'<circle cx="{at:.1f}" cy="{height:.1f}" r="{RADIUS}" fill="{colour}"/>')
            drawn.append(_text(at + RADIUS + 3, height - 4, label, size=LETTERS))
    body = "\n".join(drawn)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n{body}\n</svg>\n'
    )


def _ticks(low: float, high: float) -> list[float]:
    """Multiples of a quarter, or of the first larger step with which they are few."""
    step = next(step for step in STEPS if (high - low) / step <= MOST_TICKS)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    return [n for n in (digit * 10.0**power for power in powers for digit in (1, 2, 3, 5, 7)) if 0.9 * low <= n <= 1.1 * high]


def _line(x: float, y: float, to_x: float, to_y: float) -> str:
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="#ddd"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
