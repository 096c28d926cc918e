"""Figures of the page for Plotly, as plain dictionaries.

A colour is `var(--name)`: the page's script looks it up in the style sheet, so that one figure works in light and dark mode.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compressor.report.html.numbers import number, power_of_ten, size
from compressor.report.html.placing import place

Figure = dict[str, Any]
COLOURS = 8  # --series-0 … in the style sheet
_SYMBOLS = ("circle", "square", "triangle-up", "diamond", "cross", "star", "pentagon", "hexagram")
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def figures(plots: Mapping[str, Any]) -> dict[str, Figure]:
    """Return every figure by the id of its element on the page.

    Args:
        plots: Result of `plot_data`.
    """
    found: dict[str, Figure] = {}
    shown = plots["quality_size"]
    for key in quality_panels(plots):
        several = len(plots["layers"]) > 1
        found[f"quality-{key}"] = quality_figure(shown["points"], key, front=several and key == shown["loss"])
    errors = [error for one in plots["layers"] for line in one["error"] for error in line if error]
    bits = [value for one in plots["layers"] for line in one["bits_per_weight"] for value in line if value is not None]
    for index, one in enumerate(plots["layers"]):
        if one["kinds"]:
            found[f"error-{index}"] = error_figure(one, errors)
            found[f"bits-{index}"] = bits_figure(one, bits)
    for key in position_panels(plots):
        found[f"position-{key}"] = position_figure(plots["positions"], key, [one["label"] for one in plots["layers"]])
    for index, one in enumerate(plots.get("search", ())):
        found[f"search-{index}"] = search_figure(one)
    return found


def quality_panels(plots: Mapping[str, Any]) -> list[str]:
    """Return the measures of quality that are plotted against size."""
    models = [point for point in plots["quality_size"]["points"] if not point["original"]]
    return [key for key in ("perplexity", "kl") if any(point[key] is not None for point in models)]


def position_panels(plots: Mapping[str, Any]) -> list[str]:
    """Return the measures that are plotted against the position in the sample; plain losses if there is nothing else."""
    present = [
        key for key in ("kl", "delta_nll") if any(value is not None for one in plots["positions"] for value in one[key])
    ]
    return present or (["nll"] if plots["positions"] else [])


def quality_figure(points: Sequence[Mapping[str, Any]], key: str, *, front: bool) -> Figure:
    """Plot perplexity or KL against size. Filled points are on the Pareto front, which `front` draws as a line."""
    points = sorted((point for point in points if point[key] is not None), key=lambda point: not point["original"])
    largest = max(point["size_bytes"] for point in points)
    scale, unit = next(((s, u) for s, u in _UNITS if largest >= s), _UNITS[-1])
    heights, axis = _kl_axis([p[key] for p in points]) if key == "kl" else _perplexity_axis([p[key] for p in points])
    data: list[dict[str, Any]] = []
    if front:
        steps = sorted((p["size_bytes"] / scale, y) for p, y in zip(points, heights, strict=True) if p["front"])
        if len(steps) > 1:
            line = {"shape": "hv", "dash": "dot", "width": 1.5, "color": "var(--muted)"}
            data.append(
                {"x": [x for x, _ in steps], "y": [y for _, y in steps], "mode": "lines", "line": line, "hoverinfo": "skip"}
            )
    names = [html.escape(point["label"]) + ("" if point["comparable"] else " †") for point in points]
    (low, high), right = axis["range"], 1.08 * largest
    spots = [(p["size_bytes"] / right, (y - low) / (high - low)) for p, y in zip(points, heights, strict=True)]
    models = 0
    for point, height, name, where in zip(points, heights, names, place(spots, names), strict=True):
        colour = "var(--ink)" if point["original"] else f"var(--series-{models % COLOURS})"
        symbol = "diamond" if point["original"] else "circle" if point["comparable"] else "x-thin"
        models += not point["original"]
        said = f"<b>{name}</b><br>{size(point['size_bytes'])}<br>perplexity {number(point['perplexity'])}"
        data.append(
            {
                "x": [point["size_bytes"] / scale],
                "y": [height],
                "mode": "markers+text" if where else "markers",
                "text": [name],
                "textposition": where or "top right",
                "cliponaxis": False,
                "marker": {
                    "symbol": symbol if point["front"] or not point["comparable"] else f"{symbol}-open",
                    "size": 10,
                    "color": colour,
                    "line": {"width": 2, "color": colour},
                },
                "hovertext": [f"{said}<br>KL {number(point['kl'])}"],
                "hoverinfo": "text",
            }
        )
    horizontal = _axis(f"size of the weights, {unit}", range=[0, right / scale])
    return _figure(data, 330, xaxis=horizontal, yaxis=_axis("", **axis))


def _kl_axis(values: Sequence[float]) -> tuple[list[float], dict[str, Any]]:
    """Return heights on a logarithmic axis whose lowest tick stands for 0 and less, and the axis."""
    positive = [value for value in values if value > 0] or [1e-3]
    low, high = math.floor(math.log10(min(positive))) - 1, math.ceil(math.log10(max(positive)) + 0.1)
    ticks = range(low, high + 1)
    text = ["0", *(power_of_ten(exponent) for exponent in ticks[1:])]
    heights = [math.log10(value) if value > 0 else low for value in values]
    return heights, {"range": [low - 0.15, high + 0.1], "tickvals": list(ticks), "ticktext": text}


def _perplexity_axis(values: Sequence[float]) -> tuple[list[float], dict[str, Any]]:
    """Return heights and axis: logarithmic if models differ tenfold, with room for names above and below."""
    low, high = min(values), max(values)
    if high < 10 * low:
        room = 0.15 * (high - low) or 0.05 * high
        return list(values), {"range": [low - room, high + 1.5 * room]}
    low, high = math.log10(low), math.log10(high)
    room = 0.1 * (high - low)
    decades = range(math.ceil(low - room), math.floor(high + room) + 1)
    ticks = {"tickvals": list(decades), "ticktext": [number(10.0**d, 1) for d in decades]}
    return [math.log10(value) for value in values], {"range": [low - room, high + 1.5 * room], **ticks}


def error_figure(one: Mapping[str, Any], errors: Sequence[float]) -> Figure:
    """Plot the error of each layer, with colours on a logarithmic scale that all models share."""
    low, high = (math.log10(f(errors)) for f in (min, max)) if errors else (-1.0, 0.0)
    if high - low < 0.01:  # one colour needs a scale too
        low, high = low - 0.5, high + 0.5
    z = [[_log(error, low) for error in line] for line in one["error"]]
    ticks = _log_ticks(low, high)
    text = [[number(error, 2) if error is not None else "" for error in line] for line in one["error"]]
    whole = all(tick == round(tick) for tick in ticks)
    named = [(tick, power_of_ten(round(tick)) if whole else number(10**tick, 1)) for tick in ticks]
    return _heat_map(one, z, text, "error", (low, high), named)


def _log(error: float | None, least: float) -> float | None:
    """Return the place of an error on the scale; an error of 0 is at its lower end."""
    return None if error is None else math.log10(error) if error > 0 else least


def bits_figure(one: Mapping[str, Any], bits: Sequence[float]) -> Figure:
    """Plot the bits per weight of each layer, with colours between whole numbers that all models share."""
    low, high = math.floor(min(bits)), math.floor(max(bits)) + 1
    step = max(1, (high - low) // 6)
    text = [[f"{value:.2f}" if value is not None else "" for value in line] for line in one["bits_per_weight"]]
    return _heat_map(
        one, one["bits_per_weight"], text, "bits", (low, high), [(n, str(n)) for n in range(low, high + 1, step)]
    )


def _log_ticks(low: float, high: float) -> list[float]:
    """Return exponents of round numbers in a range: decades, or 1-2-5 if there are few decades."""
    decades = [float(n) for n in range(math.ceil(low), math.floor(high) + 1)]
    if len(decades) >= 3:
        return decades[:: max(1, len(decades) // 5)]
    finer = [n + math.log10(d) for n in range(math.floor(low), math.ceil(high) + 1) for d in (1, 2, 5)]
    inside = [tick for tick in finer if low <= tick <= high]
    return inside[:: 1 + len(inside) // 4] or [low]


def _heat_map(
    one: Mapping[str, Any],
    z: Sequence[Sequence[float | None]],
    text: Sequence[Sequence[str]],
    ramp: str,
    limits: tuple[float, float],
    ticks: Sequence[tuple[float, str]],
) -> Figure:
    """Draw a heat map: kinds of layers from top to bottom in the order of computation, blocks from left to right."""
    said = [
        [_cell_text(*cell) for cell in zip(*line, strict=True)]
        for line in zip(one["layer"], one["option"], one["bits_per_weight"], one["error"], strict=True)
    ]
    few = len(one["blocks"]) <= 8
    data = {
        "type": "heatmap",
        "x": one["blocks"],
        "y": [html.escape(kind) for kind in one["kinds"]],
        "z": z,
        "zmin": limits[0],
        "zmax": limits[1],
        "colorscale": [[step / 4, f"var(--{ramp}-{step})"] for step in range(5)],
        "xgap": 1,
        "ygap": 1,
        **({"text": text, "texttemplate": "%{text}"} if few else {}),
        "hovertext": said,
        "hoverinfo": "text",
        "hoverongaps": False,
        "colorbar": {
            "orientation": "h",
            "thickness": 8,
            "y": 1,
            "yanchor": "bottom",
            "ypad": 5,
            "xpad": 0,
            "outlinewidth": 0,
            "ticks": "",
            "tickvals": [tick for tick, _ in ticks],
            "ticktext": [said for _, said in ticks],
            "ticklabelposition": "outside top",
        },
    }
    ends = {"showgrid": False, "showline": False, "ticklen": 5, "tickcolor": "rgba(0,0,0,0)"}
    horizontal = _axis("", **ends, **({"dtick": 1} if few else {"nticks": 12}))
    vertical = _axis("", **ends, autorange="reversed", type="category")
    return _figure([data], 95 + 26 * len(one["kinds"]), xaxis=horizontal, yaxis=vertical)


def _cell_text(layer: str | None, option: str | None, bits: float | None, error: float | None) -> str:
    if layer is None or option is None:
        return ""
    return f"<b>{html.escape(layer)}</b><br>{html.escape(option)}, {number(bits)} bits per weight<br>error {number(error, 3)}"


def position_figure(series: Sequence[Mapping[str, Any]], key: str, order: Sequence[str]) -> Figure:
    """Plot a measure against the position in the sample, on a logarithmic axis with ticks at powers of two."""
    data = []
    for one in series:
        index = order.index(one["label"])
        shown = [n for n, value in enumerate(one[key]) if value is not None]
        name, colour = html.escape(one["label"]), f"var(--series-{index % COLOURS})"
        ranges = [str(a) if a == b else f"{a}–{b}" for a, b in zip(one["first"], one["last"], strict=True)]
        data.append(
            {
                "x": [math.log2(math.sqrt(one["first"][n] * one["last"][n])) for n in shown],
                "y": [one[key][n] for n in shown],
                "name": name,
                "mode": "lines+markers",
                "line": {"color": colour, "width": 1.75},
                "marker": {"size": 7, "symbol": _SYMBOLS[index % len(_SYMBOLS)], "color": colour},
                "hovertext": [
                    f"<b>{name}</b><br>tokens {ranges[n]} ({one['tokens'][n]:,} predictions)<br>{number(one[key][n])}"
                    for n in shown
                ],
                "hoverinfo": "text",
            }
        )
    powers = _powers(one["last"] for one in series)
    horizontal = _axis("place in the sample, tokens", tickvals=powers, ticktext=[f"{2**n}" for n in powers])
    horizontal["range"] = [-0.4, max(powers) + (powers[1] - powers[0] if len(powers) > 1 else 1)]
    values = [value for one in series for value in one[key] if value is not None]
    if key == "kl" and min(values) > 0 and max(values) > 20 * min(values):
        decades = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
        ticks = {"tickvals": [10.0**n for n in decades], "ticktext": [power_of_ten(n) for n in decades]}
        vertical = _axis("", type="log", **ticks)
    else:
        vertical = _axis("", rangemode="normal" if key == "nll" else "tozero", zeroline=True, zerolinecolor="var(--muted)")
    figure = _figure(data, 300, xaxis=horizontal, yaxis=vertical)
    if len(series) > 1:
        figure["layout"] |= {"showlegend": True, "legend": {"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0}}
    return figure


def search_figure(one: Mapping[str, Any]) -> Figure:
    """Plot the fitness of a search's choices over time in seconds, by stage; the allocators' choices are at its start."""
    data = []
    for index, stage in enumerate(dict.fromkeys(one["stage"])):
        shown = [n for n, of in enumerate(one["stage"]) if of == stage]
        colour, name = f"var(--series-{index % COLOURS})", html.escape(stage)
        data.append(
            {
                "x": [one["seconds"][n] for n in shown],
                "y": [one["fitness"][n] for n in shown],
                "name": name,
                "mode": "lines+markers" if len(shown) > 1 else "markers",
                "line": {"color": colour, "width": 1.75},
                "marker": {"size": 7, "symbol": _SYMBOLS[index % len(_SYMBOLS)], "color": colour},
                "hovertext": [
                    f"<b>{name}</b> {one['number'][n] or ''}<br>{one['seconds'][n]:g} s<br>KL {number(one['fitness'][n])}"
                    for n in shown
                ],
                "hoverinfo": "text",
            }
        )
    vertical = _axis("", type="log") if min(one["fitness"]) > 0 else _axis("", rangemode="tozero")
    figure = _figure(data, 300, xaxis=_axis("seconds, measuring not included", rangemode="tozero"), yaxis=vertical)
    figure["layout"] |= {"showlegend": True, "legend": {"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0}}
    return figure


def _powers(lasts: Iterable[Sequence[int]]) -> list[int]:
    """Return exponents for the ticks, at most eight."""
    most = math.floor(math.log2(max(last for one in lasts for last in one)))
    return list(range(0, most + 1, 1 + most // 8))


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {
        "title": {"text": title, "standoff": 8, "font": {"size": 12, "color": "var(--muted)"}},
        "gridcolor": "var(--rule)",
        "linecolor": "var(--muted)",
        "tickcolor": "var(--muted)",
        "ticks": "outside",
        "ticklen": 4,
        "showline": True,
        "zeroline": False,
        "fixedrange": True,
        "automargin": True,
        **more,
    }


def _figure(data: list[dict[str, Any]], height: int, **layout: Any) -> Figure:
    return {
        "data": data,
        "height": height,
        "layout": {
            "margin": {"l": 8, "r": 12, "t": 16, "b": 8},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "var(--font)", "size": 12, "color": "var(--ink)"},
            "hoverlabel": {
                "bgcolor": "var(--paper)",
                "bordercolor": "var(--muted)",
                "font": {"color": "var(--ink)", "family": "var(--font)"},
                "align": "left",
            },
            "showlegend": False,
            "dragmode": False,
            **layout,
        },
    }
