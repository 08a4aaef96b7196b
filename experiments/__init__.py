"""Entry points and configurations: the layer that maps names to classes."""
