"""HTML page of one or several reports: style, script, Plotly and data in one file that loads nothing else."""

import functools
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from compressor.report.html import figures, model, numbers, tables
from compressor.report.html.model import Model
from compressor.report.html.plots import Reports, common_text, judged_text, origins, plot_data


def render(reports: Reports, title: str | None = None, plots: Mapping[str, Any] | None = None) -> str:
    """Render a page about one model, or one that compares several.

    Args:
        reports: Contents of report.json files, at least one.
        title: Title of the page; None takes the model's name, or the number of models.
        plots: Result of `plot_data` for the reports, if it has been computed already.
    """
    from plotly.offline import get_plotlyjs

    plots = plot_data(reports) if plots is None else plots
    models = _models(reports, plots)
    return _template().render(
        title=title or _title(reports),
        models=models,
        several=len(models) > 1,
        notes=_notes(models, plots),
        loss=plots["quality_size"]["loss"],
        plots=plots,
        tables=tables,
        samples=model.samples(models),
        yaml=lambda data: yaml.safe_dump(data, sort_keys=False, allow_unicode=True),
        hints=model,
        number=numbers.number,
        size=numbers.size,
        quality_panels=figures.quality_panels(plots),
        position_panels=figures.position_panels(plots),
        figures=_embedded(figures.figures(plots)),
        style=Markup(_own("page.css")),
        script=Markup(_own("page.js")),
        plotly=Markup(get_plotlyjs()),
    )


@functools.cache
def _template() -> Template:
    """Compile the page's template, once per process."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["prose"] = tables.prose
    return environment.from_string(_own("page.html"))


def _models(reports: Reports, plots: Mapping[str, Any]) -> list[Model]:
    common = common_text(reports)
    front = {p["label"] for p in plots["quality_size"]["points"] if p["front"] and not p["original"]}
    return [
        Model.of(
            report,
            one["label"],
            comparable=not report.get("quality") or judged_text(report) == common,
            front=one["label"] in front and len(reports) > 1,
        )
        for report, one in zip(reports, plots["layers"], strict=True)
    ]


def _title(reports: Reports) -> str:
    if len(reports) == 1:
        return str(reports[0]["out"])
    names = {str(report["model"]) for report in reports}
    return f"{len(reports)} compressed models" + (f" of {names.pop()}" if len(names) == 1 else "")


def _notes(models: list[Model], plots: Mapping[str, Any]) -> list[str]:
    """Return notes on figures that cannot be compared."""
    found = []
    others = [one.label for one in models if not one.comparable]
    if others:
        found.append(
            f"† {', '.join(others)}: judged on other text than the rest. Perplexity and KL do not compare across texts; "
            "`compress compare` judges models on the same one."
        )
    if any(one.report["quality"] and judged_text(one.report) is None for one in models) and len(models) > 1:
        found.append("Some reports do not say on which text they were judged; whether they compare is not known.")
    if len(origins([one.report for one in models])) > 1:
        found.append("These models come from different originals; each one’s KL is from its own.")
    if len(models) > 1 and plots["quality_size"]["loss"] == "perplexity":
        found.append("Not every model has a KL divergence; they are ranked by perplexity.")
    return found


def _embedded(data: Any) -> Markup:
    """Encode data as JSON for a script element; `<` is escaped, because it could end the element."""
    return Markup(json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))


def _own(name: str) -> str:
    return (files("compressor.report.html") / name).read_text(encoding="utf-8")
