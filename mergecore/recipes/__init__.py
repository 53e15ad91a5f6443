"""Making one model."""
