"""Named tensors in files and in memory."""
