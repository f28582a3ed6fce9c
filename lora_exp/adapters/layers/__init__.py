"""Kinds of adapted layers, one file each: geometry, and how they stand in for the layer that they adapt."""
