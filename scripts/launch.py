"""torchrun without its page of traceback: what failed has been said already by the process that failed.

Lives here: nothing but that. Arguments are torchrun's; launch.sh gives them.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main() -> None:
    """Run the processes; exit with the status of the first that failed, or as a signal asks."""
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        raise SystemExit(failure.exitcode if failure.exitcode > 0 else 1) from None
    except SignalException as stopped:
        raise SystemExit(128 + stopped.sigval) from None


if __name__ == "__main__":
    main()
