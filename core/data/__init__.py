"""Images with captions, prompts, and caches of what the frozen parts compute from them."""
