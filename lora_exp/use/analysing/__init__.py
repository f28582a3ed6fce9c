"""``task=analyse``: spectra and intruders by layer, overlap between runs, the loss at smaller ranks."""
