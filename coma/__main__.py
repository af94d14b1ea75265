"""`python -m coma COMMAND ...` is `coma COMMAND ...`; so is `torchrun -m coma COMMAND ...`."""

import os
import sys

if __name__ == "__main__":
    home = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    if not sys.flags.safe_path and os.path.realpath(sys.path[0]) != home:
        del sys.path[0]  # the current folder: its pretrain.py, export.py or demo.py is not ours

    from coma.cli import main

    sys.exit(main())
