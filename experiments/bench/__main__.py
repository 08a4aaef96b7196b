"""``python -m experiments.bench`` is ``fewstep bench``."""

import sys

from experiments.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
