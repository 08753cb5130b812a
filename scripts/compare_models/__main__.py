"""`python -m scripts.compare_models`."""

import sys

from scripts.compare_models.command import main

sys.exit(main())
