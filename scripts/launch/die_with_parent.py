"""Becomes the command that it is given, tied to the process that started it.

    python scripts/tied.py COMMAND [ARGUMENT ...]

Where that process is killed the command gets SIGTERM: without it a killed launcher would leave workers behind, which
go on training in a folder that the next start wants. Only Linux can do so; elsewhere the command runs untied.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h; it outlives exec

if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    os.execv(sys.argv[1], sys.argv[1:])
