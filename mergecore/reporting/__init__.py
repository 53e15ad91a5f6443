"""Scores as records, tables and figures."""
