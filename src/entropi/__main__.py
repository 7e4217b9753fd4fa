"""`python -m entropi` is the command `entropi`."""

import sys

from entropi.cli import main

if __name__ == "__main__":
    sys.exit(main())
