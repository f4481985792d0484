"""The loop, objectives, phases and checkpoints."""
