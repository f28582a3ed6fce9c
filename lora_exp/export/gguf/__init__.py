"""GGUF, the file format of llama.cpp: names and order of weights, tokenizers, number formats, and its runtime."""
