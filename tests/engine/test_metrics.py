"""Accuracy from scores: values worked out by hand, every video exactly once, the same for any order and split."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from engine import metrics
from engine.distributed import start
from engine.metrics import Accuracy, MetricsError, Scores, compute_accuracy
from tests.helpers.processes import run_in_two


def _scores(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_values_worked_out_by_hand() -> None:
    score = _scores(
        [6, 5, 4, 3, 2, 1, 0],  # label 0: right
        [6, 5, 4, 3, 2, 1, 0],  # label 4: fifth
        [6, 5, 4, 3, 2, 1, 0],  # label 5: sixth
        [0, 0, 0, 0, 1, 0, 0],  # label 4: right
    )
    accuracy = compute_accuracy(torch.arange(4), score, torch.tensor([0, 4, 5, 4]), expected=4)
    assert (accuracy.top1, accuracy.top5, accuracy.videos, accuracy.skipped) == (50.0, 75.0, 4, 0)
    assert accuracy.per_class == (100.0, None, None, None, 50.0, 0.0, None)
    assert accuracy.mean_class == 50.0
    assert accuracy.confusion[4] == (1, 0, 0, 0, 1, 0, 0) and sum(map(sum, accuracy.confusion)) == 4
    assert json.loads(json.dumps(accuracy.to_dict()))["per_class"][1] is None


def test_equal_scores_rank_by_class_and_few_classes_have_no_top5() -> None:
    accuracy = compute_accuracy(torch.arange(2), torch.ones(2, 3).double(), torch.tensor([0, 2]), expected=2)
    assert accuracy.top1 == 50.0 and accuracy.top5 == 100.0


def test_a_video_scores_the_mean_of_its_softmaxed_views() -> None:
    # the mean of the logits would say class 1; the mean of the probabilities says class 0
    logits = torch.tensor([[[2.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 9.0, 0.0]]])
    scores = Scores()
    scores.add(torch.tensor([0]), logits, torch.tensor([0]))
    torch.testing.assert_close(scores.score[0], logits.double().softmax(-1).mean(1))
    assert scores.score[0].dtype == torch.float64 and scores.accuracy(expected=1).top1 == 100.0


def test_what_tdn_sums_is_kept_beside() -> None:
    logits = torch.tensor([[[2.0, -3.0, 0.5], [-1.0, -2.0, 1.5]], [[0.0, 1.0, -1.0], [-4.0, 3.0, -1.0]]])
    scores = Scores()
    scores.add(torch.tensor([1, 0]), logits, torch.tensor([0, 1]))
    table = scores.collect(expected=2)
    assert table.positive_logit.tolist() == [[0.0, 2.0, 0.0], [1.0, 0.0, 1.0]]


def _videos(videos: int = 23, views: int = 3, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels, made coarse so that many scores are equal; no video has the last class."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(videos, views, classes, generator=generator).round()
    return logits, torch.randint(classes - 1, (videos,), generator=generator)


def _filled(rows: torch.Tensor, size: int) -> Scores:
    """The scores of some of the videos, in batches of `size`."""
    logits, label = _videos()
    scores = Scores()
    for batch in rows.split(size):
        scores.add(batch, logits[batch], label[batch], [f"videos/{row}.avi" for row in batch.tolist()])
    return scores


def _assert_same(one: Accuracy, other: Accuracy) -> None:
    """Bit for bit, raw scores included."""
    assert one == other and (one.table.path, one.table.skipped) == (other.table.path, other.table.skipped)
    for name in ("index", "score", "label"):
        assert torch.equal(getattr(one.table, name), getattr(other.table, name)), name
    logits = [table.positive_logit for table in (one.table, other.table)]
    assert None in logits or torch.equal(*logits)


@pytest.mark.parametrize("processes", [1, 2, 3, 23, 25])
def test_any_number_of_processes_batch_size_and_order_give_the_same(
    processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _filled(torch.arange(23), 23).accuracy(expected=23)
    assert whole.table.path[:2] == ("videos/0.avi", "videos/1.avi") and whole.table.index.tolist() == list(range(23))
    generator = torch.Generator().manual_seed(processes)
    for size, shuffled in itertools.product((1, 2, 5, 64), (False, True)):
        order = torch.randperm(23, generator=generator) if shuffled else torch.arange(23)
        shares = [_filled(order[rank::processes], size) if rank < 23 else Scores() for rank in range(processes)]
        monkeypatch.setattr(metrics, "gather", lambda own, shares=shares: [share._packed() for share in shares])
        for share in shares[:3]:
            _assert_same(share.accuracy(expected=23), whole)


def test_the_numbers_equal_plain_counting() -> None:
    accuracy = _filled(torch.arange(23), 4).accuracy(expected=23)
    logits, label = _videos()
    right, in_five, classes = 0, 0, {}
    for row in range(23):
        exponents = logits[row].double().exp()
        scores = (exponents / exponents.sum(1, keepdim=True)).mean(0).tolist()
        # equal scores of different origin may differ in the last bits here: round them, for the ranks alone
        ranked = sorted(range(7), key=lambda k: (-round(scores[k], 12), k))
        assert accuracy.table.score[row].tolist() == pytest.approx(scores, rel=1e-12)
        right += ranked[0] == label[row]
        in_five += int(label[row]) in ranked[:5]
        classes.setdefault(int(label[row]), []).append(ranked[0] == label[row])
    assert (accuracy.top1, accuracy.top5) == (100 * right / 23, 100 * in_five / 23)
    shares = [sum(hits) / len(hits) for hits in classes.values()]
    assert accuracy.mean_class == pytest.approx(100 * sum(shares) / len(shares)) and len(shares) == 6
    assert accuracy.per_class[6] is None and accuracy.confusion[6] == (0,) * 7


def _one_of_two(rank: int) -> None:
    start("cpu")
    whole = compute_accuracy(torch.arange(23), *_scores_and_labels(), expected=24, skipped=1, path=_filled_names())
    own = _filled(torch.arange(rank, 23, 2).flip(0), 2 + rank)
    own.skipped = rank
    _assert_same(own.accuracy(expected=24), whole)
    with pytest.raises(MetricsError, match=r"video 1 \(videos/1.avi\) was evaluated more than once"):
        _filled(torch.arange(23)[rank:], 4).accuracy(expected=24)


def _scores_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    scores = _filled(torch.arange(23), 23)
    return torch.cat(scores.score), torch.cat(scores.label)


def _filled_names() -> list[str]:
    return [f"videos/{row}.avi" for row in range(23)]


def test_two_real_processes_give_the_same() -> None:
    run_in_two(_one_of_two)


def test_a_score_depends_on_its_own_views_alone() -> None:
    logits = torch.randn(64, 30, 174, generator=torch.Generator().manual_seed(0))
    together, alone = Scores(), Scores()
    together.add(torch.arange(64), logits, torch.zeros(64, dtype=torch.int64))
    for row in range(64):
        alone.add(torch.tensor([row]), logits[row : row + 1], torch.tensor([0]))
    assert torch.equal(torch.cat(together.score), torch.cat(alone.score))


def test_names_are_optional_and_what_is_added_must_fit() -> None:
    scores = Scores()
    scores.add(torch.tensor([1, 0]), torch.zeros(2, 1, 3), torch.tensor([0, 1]))
    assert scores.collect(expected=2).path == ("0", "1")
    with pytest.raises(ValueError, match="2 indices, 2 logits, 2 labels, 1 names"):
        scores.add(torch.tensor([3, 2]), torch.zeros(2, 1, 3), torch.tensor([0, 1]), ["a"])


def test_the_raw_scores_are_no_part_of_the_written_numbers() -> None:
    accuracy = _filled(torch.arange(23), 4).accuracy(expected=23)
    plain = accuracy.to_dict()
    assert "table" not in plain and Accuracy(**plain) == accuracy
    assert json.loads(json.dumps(plain))["predicted"][22][0] == 22


def test_skipped_videos_are_counted_apart() -> None:
    scores = Scores(skipped=2)
    scores.add(torch.tensor([0, 3]), torch.eye(2).unsqueeze(1), torch.tensor([0, 1]))
    accuracy = scores.accuracy(expected=4)
    assert (accuracy.top1, accuracy.videos, accuracy.skipped) == (100.0, 2, 2)


@pytest.mark.parametrize(
    ("index", "label", "expected", "message"),
    [
        ([0, 1, 1], [0, 1, 1], 3, "video 1 was evaluated more than once"),
        ([0, 1, 5], [0, 1, 1], 3, "video 5 was evaluated, but the list has only 3"),
        ([0, 1, 3], [0, 1, 1], 5, "3 videos were evaluated and 0 skipped, but the list has 5; without a score: 2, 4"),
        ([0, 1, 2], [0, 1, 2], 3, "label 2, but the model gives 2 classes"),
    ],
)
def test_anything_but_each_video_once_is_an_error(index, label, expected: int, message: str) -> None:
    score = torch.full((3, 2), 0.5, dtype=torch.float64)
    with pytest.raises(MetricsError, match=message):
        compute_accuracy(torch.tensor(index), score, torch.tensor(label), expected)


def test_no_video_and_not_a_number_are_errors() -> None:
    with pytest.raises(MetricsError, match=r"none of 3 videos could be evaluated \(3 were skipped\)"):
        Scores(skipped=3).accuracy(expected=3)
    with pytest.raises(MetricsError, match="output for video 1 is not finite"):
        compute_accuracy(torch.tensor([1, 0]), _scores([float("nan"), 1], [0, 1]), torch.tensor([0, 1]), expected=2)
