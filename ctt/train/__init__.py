"""The training loop: settings, state, step, checkpoint, evaluation, logging."""
