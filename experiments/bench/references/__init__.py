"""Steps of the official releases, written here from the papers' algorithms as those releases schedule them.

They are what a plain implementation costs: diffusers' networks and schedulers, eager PyTorch, one process, with our
networks, losses, batch and dtype. Each says what it mirrors and what it is spared. All read latents and embeddings that
are already computed, and have our critic's head.
"""
