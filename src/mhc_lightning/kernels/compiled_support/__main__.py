"""Builds the CPU kernels ahead of their first use: for an image, or for the nodes of a cluster."""

import sys

from mhc_lightning.kernels.compiled_support.build import BuildError, built_library

if __name__ == "__main__":
    try:
        print(built_library())
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
