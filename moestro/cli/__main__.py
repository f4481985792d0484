"""`python -m moestro.cli`, the same as the `moestro` command."""

import sys

from moestro.cli import main


if __name__ == "__main__":
    sys.exit(main())
