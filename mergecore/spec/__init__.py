"""What people write: sweeps, recipes, mergekit's YAML."""
