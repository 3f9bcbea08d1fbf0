"""The command python -m datasets.verify; its code is in datasets/prepare/verify.py."""

import sys

from .prepare.verify import main

if __name__ == "__main__":
    sys.exit(main())
