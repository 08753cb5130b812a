"""List files: what is accepted, and that every refusal names the file and the line."""

from pathlib import Path

import pytest

from datasets.annotation import AnnotationError, VideoRecord, few_shot, read_labels, read_list

KINETICS_LABELS = Path(__file__).parents[3] / "shared/data/annotations/k400/kinetics_400_labels.csv"


def write(tmp_path, text, name="list.txt"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_rgb_rows(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbfa/b 12 0\r\n\r\nname with  spaces\t7 1\r\n")
    assert read_list(path, "RGB", 2) == (VideoRecord("a/b", 12, 0, 1), VideoRecord("name with  spaces", 7, 1, 3))


def test_video_rows(tmp_path):
    path = write(tmp_path, "a b.avi 1\nc.avi 30 0\n1 1\n")
    assert read_list(path, "video", 2) == (
        VideoRecord("a b.avi", None, 1, 1),
        VideoRecord("c.avi", 30, 0, 2),
        VideoRecord("1", None, 1, 3),
    )


@pytest.mark.parametrize(
    ("row", "modality", "message"),
    [
        ("a 1", "RGB", "path num_frames label"),
        ("1", "RGB", "path num_frames label"),
        ("a", "video", "label must be a whole number, not 'a'"),
        ("3", "video", "needs `path label`"),
        ("5 1", "RGB", "path num_frames label"),
        ("a x 1", "RGB", "number of frames must be a whole number, not 'x'"),
        ("a 1.5 1", "RGB", "not '1.5'"),
        ("a 0 1", "RGB", "must be above 0, not 0"),
        ("a -3 1", "RGB", "must be above 0, not -3"),
        ("a -3 1", "video", "must be above 0, not -3"),
        ("a 3 x", "RGB", "label must be a whole number"),
        ("a 3 2", "RGB", "label 2 is outside 0..1"),
        ("a 3 -1", "RGB", "label -1 is outside 0..1"),
        ("a.avi 2", "video", "label 2 is outside 0..1"),
        ("a.avi 1.0", "video", "label must be a whole number, not '1.0'"),
        ("a.avi " + "1" * 5000, "video", "label must be a whole number"),
        ("a.avi 3", "RGB", "data.modality: video reads `path label`"),
        ("a.avi,1", "video", "fields are separated by spaces or tabs, not as in 'a.avi,1'"),
        ("a.avi, 1", "video", "fields are separated by spaces or tabs, not as in 'a.avi, 1'"),
        ("a;3;1", "RGB", "fields are separated by spaces or tabs"),
        ("a, 3, 1", "RGB", "not '3,'"),
        ('"a b.avi" 1', "video", "paths are written without quotes, even with spaces: '\"a b.avi\"'"),
        ("'a' 3 1", "RGB", "paths are written without quotes"),
        (r"run\a.avi 1", "video", "folders are separated by /, not by a backslash"),
        ("path num_frames label", "RGB", "label must be a whole number, not 'label'"),
        ("a\0b 3 1", "RGB", "a path cannot hold a NUL"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path, row, modality, message):
    path = write(tmp_path, f"fine 3 1\n\n{row}\n")
    with pytest.raises(AnnotationError) as caught:
        read_list(path, modality, 2)
    assert f"{path}, line 3: " in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tabs_and_spaces_at_the_end_are_read(tmp_path):
    path = write(tmp_path, "a, b/it's c.avi\t 1 \t\r\nx\t0\n")
    assert read_list(path, "video", 2) == (VideoRecord("a, b/it's c.avi", None, 1, 1), VideoRecord("x", None, 0, 2))


def test_labels_that_begin_at_1_are_recognised(tmp_path):
    with pytest.raises(
        AnnotationError, match=r"line 2: label 2 is outside 0\.\.1; labels seem to begin at 1 \(line 1\)"
    ):
        read_list(write(tmp_path, "a 1\nb 2\n"), "video", 2)
    for text in ("a 0\nb 2\n", "a 1\nb 7\n"):
        with pytest.raises(AnnotationError, match=r"is outside 0\.\.1$"):
            read_list(write(tmp_path, text), "video", 2)


def test_unusable_files_name_the_key(tmp_path):
    for path in (
        write(tmp_path, "\n \n"),
        write(tmp_path, b"caf\xe9.avi 0\n", "latin"),
        str(tmp_path / "no"),
        str(tmp_path),
    ):
        with pytest.raises(AnnotationError, match=r"data\.val_list") as caught:
            read_list(path, "video", 2, "data.val_list")
        assert path in str(caught.value)


def test_labels(tmp_path):
    assert read_labels(write(tmp_path, 'id,name\r\n1,run\r\n0,"eat, fast"\r\n'), 2) == ("eat, fast", "run")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,a\n1,b\n", "line 1: the header"),
        ("id,name\n0,a\n", "1 classes, but data.num_classes"),
        ("id,name\n0,a\n2,b\n", "ids up to 2"),
        ("id,name\n0,a\n0,b\n", "line 3: id 0 occurs twice"),
        ("id,name\n0\n1,b\n", "line 2: needs `id,name`"),
        ("id,name\nx,a\n1,b\n", "line 2: the id must be"),
        ("", "0 classes"),
    ],
)
def test_bad_labels(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(AnnotationError) as caught:
        read_labels(path, 2)
    assert message in str(caught.value) and path in str(caught.value)


@pytest.mark.skipif(not KINETICS_LABELS.is_file(), reason="the published Kinetics label file is not here")
def test_kinetics_labels():
    names = read_labels(str(KINETICS_LABELS), 400)
    assert names[0] == "abseiling" and len(set(names)) == 400


def test_few_shot_keeps_length_and_is_seeded():
    records = [VideoRecord(f"v{i}", None, i % 3, i + 1) for i in range(60)]
    chosen = few_shot(records, 2, seed=1)
    assert len(chosen) == 60 and len(set(chosen)) == 6
    assert all(sum(record.label == label for record in set(chosen)) == 2 for label in range(3))
    assert chosen == few_shot(records, 2, seed=1) != few_shot(records, 2, seed=2)
    assert len(few_shot(records, 20, seed=1)) == 60
    assert len(few_shot(records[:11], 3, seed=1)) == 9


def test_few_shot_names_the_poor_class():
    records = [VideoRecord("a", None, 0, 1), VideoRecord("b", None, 0, 2), VideoRecord("c", None, 4, 3)]
    with pytest.raises(AnnotationError, match="class 4 has 1 training videos, not 2"):
        few_shot(records, 2, seed=0)
