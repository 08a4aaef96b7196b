"""Metrics, and the protocol that identifies a number."""
