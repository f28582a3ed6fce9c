"""Kinds of adapters, one file each: parameters, their start and their formula."""
