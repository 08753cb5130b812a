"""What probably means something else is said in one sentence with a row, and what is plain is not."""

from datasets.annotation import VideoRecord
from datasets.list_doubts import list_doubts


def records(*rows):
    return [VideoRecord(*row, line) for line, row in enumerate(rows, 1)]


def doubts(rows, num_classes, names=None, modality="video", trains=True):
    return dict(list_doubts(rows, modality, num_classes, names, trains))


def test_a_plain_list_raises_no_doubt():
    rows = records(("a", None, 0), ("b", None, 1), ("a", None, 0))
    assert doubts(rows, 2) == {}


def test_numbers_that_may_be_labels_are_called_frame_counts():
    rows = records(("a.mp4", None, 0), ("x.mp4", 3, 5), ("y.mp4", 4, 1))
    text = doubts(rows, 6, trains=False)["frame counts"]
    assert text.startswith("2 of 3 rows have a number between path and label, which is taken for the number of frames")
    assert text.endswith("in line 2, 'x.mp4' has 3 frames and label 5")
    assert "frame counts" in doubts(rows[1:], 6)
    assert doubts(rows, 6, modality="RGB", trains=False) == {}


def test_numbers_that_are_no_labels_are_plainly_frame_counts():
    assert doubts(records(("x.mp4", 3, 1), ("y.mp4", 120, 0)), 6, trains=False) == {}


def test_videos_with_several_labels_are_named_with_their_lines():
    rows = records(("a", 3, 0), ("b", 3, 1), ("a", 3, 1), ("a", 3, 0))
    assert doubts(rows, 2, modality="RGB") == {"labels": "1 video with different labels: a (lines 1 and 3)"}
    rows = records(("a/x", 3, 0), ("./a//x", 3, 1))
    assert doubts(rows, 2, modality="RGB") == {"labels": "1 video with different labels: a/x (lines 1 and 2)"}


def test_classes_without_training_videos_are_named():
    rows = records(("a", 3, 0), ("b", 3, 2))
    assert doubts(rows, 3, ["run", "jump", "sit"], "RGB") == {"classes": "1 of 3 classes have no video: 1 (jump)"}
    assert doubts(rows, 3, modality="RGB", trains=False) == {}
    assert doubts(rows, 9, modality="RGB")["classes"] == "7 of 9 classes have no video: 1, 3, 4, ..."


def test_an_empty_first_class_means_that_labels_may_begin_at_1():
    text = doubts(records(("a", 3, 2), ("b", 3, 1)), 3, modality="RGB")["classes"]
    assert text == "1 of 3 classes have no video: 0; labels seem to begin at 1 (line 2), but the first class is 0"
