"""Evaluators: one file each, their heavy imports inside. The kind is in `mergecore/plugins/evaluator.py`."""
