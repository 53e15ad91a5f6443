"""Pure functions on tensors that plug-ins share."""
