"""Libraries say nothing while a command works: no bars for reading a file of a second."""

from __future__ import annotations

import os


def quieten() -> None:
    """Switch off the bars of transformers and diffusers for loading and saving; those of downloads stay.

    A library whose verbosity the environment sets (TRANSFORMERS_VERBOSITY, DIFFUSERS_VERBOSITY) says what it was asked
    to. Warnings stay as well: they tell of weights that are missing in a file.
    """
    from diffusers.utils import logging as diffusers
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers

    if "DIFFUSERS_VERBOSITY" not in os.environ:
        diffusers.disable_progress_bar()
    if "TRANSFORMERS_VERBOSITY" not in os.environ and not are_progress_bars_disabled():
        transformers.disable_progress_bar()
        enable_progress_bars()  # transformers has switched off those of downloads, too
