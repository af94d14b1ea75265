"""`python -m pretrain COMMAND ...` is `coma COMMAND ...`; so is `torchrun -m pretrain COMMAND ...`."""

import sys

from pretrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
