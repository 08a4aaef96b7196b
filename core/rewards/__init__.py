"""Reward models: what a student should maximise. None of them is a judge."""
