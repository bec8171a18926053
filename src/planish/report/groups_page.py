"""The page of `planish inspect -o`: one offline HTML file with the net drawn beside the table of its groups."""

from __future__ import annotations

from typing import Any

import planish
from planish.report.groups_text import dense, share, state
from planish.report.picture import picture
from planish.report.templating import asset, environment

_ROLES = {"out": "issued by", "in": "read by", "affine": "with parameters in", "passes": "let through by"}


def groups_page(data: dict[str, Any]) -> str:
    """The page for what `planish inspect` found: HTML that needs no network.

    Args:
        data: the object that `inspect --json` prints; every name in it is escaped, wherever it came from.
    """
    return (
        environment()
        .get_template("groups.html.j2")
        .render(
            data=data,
            version=planish.__version__,
            picture=picture(data),
            states=[state(group) for group in data["groups"]],
            shares=[(share(group["share_of_parameters"]), share(group["share_of_macs"])) for group in data["groups"]],
            said=[_said(group) for group in data["groups"]],
            dense=dense(data),
            share=share,
            css=asset("page.css") + asset("groups.css"),
            script=asset("groups.js"),
        )
    )


def _said(group: dict[str, Any]) -> str:
    """What is read out when a group lights up."""
    counts = [f"{_ROLES[role]} {len(names)}" for role, names in group["operators"].items() if names]
    return f"{group['units']} {group['unit']}, {', '.join(counts)} of the operators"
