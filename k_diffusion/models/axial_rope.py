"""The published home of the position functions; they live in `rope`."""

from .rope import bounding_box, centers, make_axial_pos, make_grid

__all__ = ["bounding_box", "centers", "make_axial_pos", "make_grid"]
