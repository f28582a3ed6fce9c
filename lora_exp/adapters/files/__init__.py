"""Adapters on disk: safetensors, and the folders that PEFT reads and writes."""
