"""Sizes of frames that are read and that are refused."""

import pytest

from datasets.limits import MAX_SIDE, SizeError, check_size


@pytest.mark.parametrize("size", [(1, 1), (4320, 7680), (MAX_SIDE, 4096), (8192, 8192)])
def test_sizes_that_are_read(size):
    check_size("a.jpg", *size)


@pytest.mark.parametrize("size", [(0, 5), (MAX_SIDE + 1, 1), (8192, 8193), (30000, 30000)])
def test_sizes_that_are_refused_name_the_file(size):
    with pytest.raises(SizeError, match=rf"^a\.jpg: states a size of {size[1]}x{size[0]} pixels"):
        check_size("a.jpg", *size)
