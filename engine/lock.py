"""A file that one process at a time holds locked, for as long as it lives.

Lives here: nothing but that. Does not live here: what a lock stands for (run_folder.py, features.py).
"""

from __future__ import annotations

import errno
import fcntl
import logging
from typing import IO

logger = logging.getLogger("td4v")


def locked(file: IO[str]) -> bool:
    """Lock a file for as long as it is open in this process; False where another process has it.

    The lock is not passed on to copies of the process, such as workers that outlive a killed run for some seconds.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        logger.warning("%s: this file system has no locks: another process that uses it goes unnoticed", file.name)
    return True
