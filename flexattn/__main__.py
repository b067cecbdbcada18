"""`python -m flexattn`: the command line, after an import of torch, which the script `flexattn` does without."""

from __future__ import annotations

import sys

from flexattn_command.main import main

if __name__ == "__main__":
    sys.exit(main())
