"""The training loop and what it needs: clock, checkpoints, monitor."""
