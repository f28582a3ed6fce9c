"""The loop over lanes and what it needs: objectives, optimizers, batches, memory figures."""
