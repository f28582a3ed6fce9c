"""The tasks, one file each (``lora_exp.task``)."""
