"""Hand-written forward and backward passes. They know the host and terms, no variant."""
