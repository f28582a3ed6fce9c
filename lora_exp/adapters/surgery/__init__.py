"""What changes a model: finding targets, injecting adapters, merging them."""
