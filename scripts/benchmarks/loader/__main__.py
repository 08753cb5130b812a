"""`python -m scripts.benchmarks.loader`."""

import sys

from scripts.benchmarks.loader.command import main

sys.exit(main())
