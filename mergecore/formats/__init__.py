"""Directories that other tools load."""
