"""A folder per step."""
