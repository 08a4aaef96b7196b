"""Discriminators for adversarial terms."""
