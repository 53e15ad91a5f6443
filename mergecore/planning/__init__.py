"""From a spec to cells and steps. Planning reads no weights."""
