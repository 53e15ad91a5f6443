"""From a spec file to a plan over its store."""
