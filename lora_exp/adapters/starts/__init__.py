"""Starts, one file each: how the factors A and B of an adapter begin."""
