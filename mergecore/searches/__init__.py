"""Searches, one file each; the registry names them."""

from mergecore.searches.greedy import Greedy
from mergecore.searches.grid import Grid
from mergecore.searches.nevergrad import Nevergrad

__all__ = ["Greedy", "Grid", "Nevergrad"]
