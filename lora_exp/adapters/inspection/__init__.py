"""What a model with adapters consists of: its layers, tensors, counts, ties and the digest of its base."""
