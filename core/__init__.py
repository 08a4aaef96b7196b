"""The library: what a distillation method needs, and nothing about one paper's numbers."""
