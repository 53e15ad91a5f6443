"""Many models: what is missing, what was chosen, what may be dropped, results."""
