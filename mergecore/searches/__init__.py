"""Searches: what a sweep tries next, by the scores so far. A file and a line here for each."""

from mergecore.searches.greedy import Greedy as Greedy
from mergecore.searches.grid import Grid as Grid
from mergecore.searches.nevergrad import Nevergrad as Nevergrad
