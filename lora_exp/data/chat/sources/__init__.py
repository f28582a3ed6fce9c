"""Data sets of conversations with a reader of their own, one file each."""
