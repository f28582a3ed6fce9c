"""One file a task: what a run trains on, as blocks ready for a model."""
