"""`python -m mhc_lightning`: see `python -m mhc_lightning --help`."""

import sys

from mhc_lightning.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
