"""The formats, one file each (``lora_exp.export.format``)."""
