"""Which adapter serves which part of a batch, live and when a checkpoint replays it."""
