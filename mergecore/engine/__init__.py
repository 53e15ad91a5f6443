"""One pass: base and experts are read once, and many steps are completed."""
