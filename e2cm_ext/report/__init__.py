"""One page that shows what a network with exits does: curves, times, exits, mistakes."""

from .view import Compared, Halves, environment, first_images, measured, refuse_no_matplotlib, write

__all__ = ["Compared", "Halves", "environment", "first_images", "measured", "refuse_no_matplotlib", "write"]
