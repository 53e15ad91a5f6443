"""What a model is: files, tensors, experts, adapters, vocabularies."""
