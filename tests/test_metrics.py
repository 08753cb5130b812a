"""Accuracy from scores: values worked out by hand, every video exactly once, the same for any order and split."""

from __future__ import annotations

import json

import pytest
import torch

from engine.metrics import MetricsError, Scores, compute_accuracy


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


def test_order_and_split_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, label = torch.randn(23, 2, 7, generator=generator), torch.randint(7, (23,), generator=generator)
    results = []
    for size, order in [(23, torch.arange(23)), (4, torch.randperm(23, generator=generator))]:
        scores = Scores()
        for rows in order.split(size):
            scores.add(rows, logits[rows], label[rows])
        results.append(scores.accuracy(expected=23))
    assert results[0] == results[1]


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
