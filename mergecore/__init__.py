"""Model merging, computed: methods, statistics and the engine. Knows nothing of Prefect, Dask or MLflow."""

from mergecore import methods
from mergecore.merging import merge

__all__ = ["merge", "methods"]
