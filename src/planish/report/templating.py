"""How the pages are made: templates that escape what they are given, and style sheets and scripts that go into the page."""

from __future__ import annotations

import functools
from importlib import resources

import jinja2
from markupsafe import Markup, escape

from planish.report.figures import count, plain


@functools.cache
def environment() -> jinja2.Environment:
    """The templates of this package; whatever is put into them is escaped, and a name that is missing is an error."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("planish.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["plain"] = plain
    found.filters["count"] = count
    found.filters["breakable"] = _breakable
    return found


def _breakable(name: str) -> Markup:
    """A dotted name, escaped, that may be broken after its dots."""
    return escape(name).replace(".", Markup(".<wbr>"))


def asset(name: str) -> Markup:
    """A style sheet or script of this package: written by us, so it goes into the page as it is."""
    return Markup((resources.files("planish.report") / "templates" / name).read_text(encoding="utf-8"))
