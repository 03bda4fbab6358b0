"""python -m vfiomig."""

import sys

from vfiomig.cli import main

sys.exit(main())
