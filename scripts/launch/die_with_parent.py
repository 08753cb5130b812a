"""Becomes the command that it is given, and lets the system end it when its parent process is killed.

    python scripts/launch/die_with_parent.py PARENT COMMAND [ARGUMENT ...]

PARENT is the parent's process id. Without this a killed launcher would leave workers behind, which keep training in a
folder that the next start needs. Only Linux supports it; elsewhere the command runs without it.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h; it outlives exec

if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):  # it was killed before the line above
        raise SystemExit(1)
    os.execv(sys.argv[2], sys.argv[2:])
