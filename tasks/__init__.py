"""Thin Prefect tasks, one file per kind of work; they do nothing that mergecore.run does not do."""
