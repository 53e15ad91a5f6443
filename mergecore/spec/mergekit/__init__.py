"""mergekit's YAML, read and turned into our recipes: its schema, its rules for values, its methods by our names.

Written from mergekit's documented behaviour (checked against 0.1.5); docs/mergekit.md says where the numbers differ.
"""
