"""Plug-ins for Mergeloom from another package."""
