"""``hydra/sweeper=study``: see ``lora_exp.sweep.study``."""
