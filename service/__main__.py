"""`python -m service [serve] [flags]` is `loraplex serve [flags]`."""

import sys

from service.cli import main

if __name__ == "__main__":
    if len(sys.argv) == 1 or sys.argv[1].startswith("-"):
        sys.argv.insert(1, "serve")
    main()
