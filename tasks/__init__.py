"""Prefect tasks, one file per kind of work. Each calls mergecore and says how it ended."""
