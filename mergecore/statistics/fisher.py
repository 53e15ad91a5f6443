"""Diagonal Fisher information (placeholder: being written by the engineer of the evaluators; replace freely)."""

from typing import ClassVar, Literal

from mergecore.method import DataStatistic, Result


class DiagonalFisher(DataStatistic):
    """To be replaced."""

    name: ClassVar[str] = "fisher"
    estimator: Literal["sampled", "exact", "empirical"] = "sampled"
    samples: int = 64
    seed: int = 0

    def compute(self, model, data, selection, report) -> Result:  # type: ignore
        raise NotImplementedError
