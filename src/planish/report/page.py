"""The report page: one offline HTML file that opens with the verdict and shows what every figure rests on."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from markupsafe import Markup

import planish
from planish.report import figures, rows
from planish.report.plots import history_figure, runtimes_figure, sensitivity_figure, trials_figure
from planish.report.sensitivity import summed_up
from planish.report.templating import asset, environment

if TYPE_CHECKING:
    from planish.result import Summary

MARK = '<meta name="generator" content="planish'
_TITLES = {"met": "Budget met", "infeasible": "Infeasible", "undecided": "Undecided"}
_OUT_OF_TIME = "Not met within the time limit"


def page(summary: Summary) -> str:
    """The page for a result: HTML that needs no network, with the plotting script inlined.

    Args:
        summary: of a run; every name in it is escaped, wherever it came from.
    """
    template = environment().get_template("page.html.j2")
    plots = {
        "trials": trials_figure(summary),
        "runtimes": runtimes_figure(summary),
        "history": history_figure(summary),
        "sensitivity": sensitivity_figure(summary),
    }
    shown = {name: figures.finite(figure) for name, figure in plots.items() if figure is not None}
    return template.render(
        s=summary,
        version=planish.__version__,
        title=_OUT_OF_TIME if summary.time_limited else _TITLES[summary.verdict],
        tiles=rows.tiles(summary),
        limits=rows.limits(summary),
        sides=rows.sides(summary),
        baselines=rows.baselines(summary),
        trials=rows.trials(summary),
        on_front=rows.on_front(summary),
        operators=rows.operators(summary),
        groups=rows.groups(summary),
        sensitivity=rows.sensitivity(summary),
        summed_up=summed_up(summary.diagnosis) if summary.diagnosis is not None else "",
        stages=rows.stages(summary),
        search=rows.search(summary),
        facts=rows.facts(summary),
        figures=shown,
        css=asset("page.css"),
        script=asset("page.js"),
        plotly=_plotly() if shown else "",
    )


@functools.cache
def _plotly() -> Markup:
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs().replace("</script", "<\\/script"))
