"""A sweep as one thing: its folder, its parent run and the comparison of its jobs."""
