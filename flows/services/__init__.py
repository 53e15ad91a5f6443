"""Servers that are started for a sweep and stopped after it."""
