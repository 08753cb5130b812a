"""Videos that are tested on although they were trained on."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from datasets.annotation import VideoRecord
from datasets.video_dataset import VideoSource

logger = logging.getLogger("td4v")


def warn_of_trained_videos(tested: VideoSource, trained: Sequence[VideoRecord], root: str, list_file: str) -> int:
    """Log one warning if rows of the tested list name videos of the training list; returns how many do.

    Two rows name the same video if their paths below their roots are the same file.

    Args:
        trained: the rows of the training list. root: the folder that their paths start from. list_file: named in the
            warning.
    """
    roots = [os.path.realpath(folder) for folder in (root, tested.root)]  # one folder may have two names
    known = {_file(roots[0], record.path) for record in trained}
    both = [record for record in tested.records if _file(roots[1], record.path) in known]
    if both:
        logger.warning(
            "%d of the %d videos in %s stand in the training list %s too, such as %s (line %d): the accuracy on them says "
            "nothing about new videos",
            *(len(both), len(tested.records), tested.list_file, list_file, both[0].path, both[0].line),
        )
    return len(both)


def _file(root: str, path: str) -> str:
    return os.path.normpath(os.path.join(root, path))
