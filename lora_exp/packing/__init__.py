"""Jobs of a sweep in one process: what they share is made once, and lanes train over one frozen base."""
