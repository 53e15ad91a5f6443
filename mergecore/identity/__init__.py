"""Step keys, content digests and counter-based random draws."""
