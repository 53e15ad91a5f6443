"""One file per method. `from mergecore import methods` gives the classes by their names."""

from mergecore.methods.average import Average
from mergecore.methods.fisher import Fisher
from mergecore.methods.task_arithmetic import TaskArithmetic
from mergecore.methods.ties import Ties
from mergecore.trims import RandomDrop

__all__ = ["Average", "Fisher", "RandomDrop", "TaskArithmetic", "Ties"]
