"""`python -m scripts.profile`."""

import sys

from scripts.profile.command import main

sys.exit(main())
