"""Distillation methods, each beside its torch-free schema."""
