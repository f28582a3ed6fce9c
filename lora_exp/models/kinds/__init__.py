"""The kinds of model, one file each: all that a config, a run and a plan ask of it."""
