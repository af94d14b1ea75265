"""`python -m coma COMMAND ...` is `coma COMMAND ...`; so is `torchrun -m coma COMMAND ...`."""

import sys

from coma.cli import main

if __name__ == "__main__":
    sys.exit(main())
