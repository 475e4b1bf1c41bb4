"""Rendering of the page: page.html, beside this file, filled by jinja2."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

from ..calibration.curves import Curve
from .figures import draw_figures
from .view import CURRENT, PageView, TimedPoint

__all__ = ["check_matplotlib", "render"]


def render(view: PageView, curves: Mapping[str, Curve], timed: Mapping[str, TimedPoint], **texts: Any) -> str:
    """Return the page as HTML.

    Args:
        view: What the page shows.
        curves: See draw_figures.
        timed: The points whose times were measured.
        texts: Everything else that the template names: `title`, `data`, `comparison`, `gallery`, `environment`,
            `command`.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    jinja = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return jinja.from_string(template).render(
        view=view,
        time=timed[CURRENT].time,
        figures={name: Markup(svg) for name, svg in draw_figures(view, curves, timed).items()},
        **texts,
    )


def check_matplotlib() -> None:
    """Raise ImportError, with what to install, if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("a report needs matplotlib: pip install 'e2cm_ext[plot]'") from error
