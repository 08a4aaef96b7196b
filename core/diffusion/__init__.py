"""Noising processes, time steps, solvers and guidance."""
