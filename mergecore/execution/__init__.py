"""Carries out steps and records them in the store."""
