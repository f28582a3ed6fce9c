"""What is told to MLflow; no other room imports it."""
