"""`python -m scripts.benchmarks.model`."""

import sys

from scripts.benchmarks.model.command import main

sys.exit(main())
