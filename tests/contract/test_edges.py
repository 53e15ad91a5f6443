"""The edges that every method of this repository must stand (mergeloom/testing)."""

from mergeloom.testing.edge_contract import *  # noqa: F403 — every test of the contract
