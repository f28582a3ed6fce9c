"""A finished run as files for other programs: one file a format in ``formats/``; each is verified in its runtime."""
