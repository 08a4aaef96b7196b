"""Running grids on SLURM clusters."""
