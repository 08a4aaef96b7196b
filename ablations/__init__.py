"""Declarative ablation grids: which runs a published table or figure needs."""
