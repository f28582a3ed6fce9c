"""Where a run computes: what this machine is fast in, how its threads wait."""
