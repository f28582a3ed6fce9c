"""One file a family of architectures that we can write as GGUF, each found by itself."""
