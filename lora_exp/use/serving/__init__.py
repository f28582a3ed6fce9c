"""An OpenAI-compatible server of one base with several adapters, whose requests are answered together."""
