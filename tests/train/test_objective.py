"""Every term against numbers worked out by hand, and its gradient against finite differences."""

import math

import pytest
import torch

from train.objective import counterfactual_ce, knockout_distillation, mean_over_answers, retention, state_distillation, total


def logits_of(*rows):
    """Logits whose softmax is exactly these probabilities."""
    return torch.tensor(rows, dtype=torch.float64).log()


def test_counterfactual_ce_by_hand():
    logits = torch.stack([logits_of([0.5, 0.25, 0.25], [0.1, 0.1, 0.8]), logits_of([0.2, 0.2, 0.6], [0.9, 0.05, 0.05])])
    targets = torch.tensor([[0, 2], [1, -100]])
    by_hand = (0.5 * (-math.log(0.5) - math.log(0.8)) + -math.log(0.2)) / 2
    assert counterfactual_ce(logits, targets).item() == pytest.approx(by_hand, abs=1e-12)


def test_knockout_distillation_by_hand():
    teacher = torch.stack([logits_of([0.75, 0.25], [0.5, 0.5])])
    student = torch.stack([logits_of([0.5, 0.5], [0.5, 0.5])])
    first = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert knockout_distillation(teacher, student, torch.tensor([[True, True]])).item() == pytest.approx(first / 2, abs=1e-12)
    assert knockout_distillation(teacher, student, torch.tensor([[True, False]])).item() == pytest.approx(first, abs=1e-12)


def test_distillation_runs_from_teacher_to_student():
    """KL is not symmetric: it is the teacher's probabilities that weigh the differences."""
    a, b = logits_of([0.9, 0.1])[None], logits_of([0.5, 0.5])[None]
    mask = torch.tensor([[True]])
    forward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    backward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert knockout_distillation(a, b, mask).item() == pytest.approx(forward, abs=1e-12)
    assert knockout_distillation(b, a, mask).item() == pytest.approx(backward, abs=1e-12)


def test_retention_by_hand_and_zero_for_equals():
    reference, student = logits_of([0.6, 0.4])[None], logits_of([0.3, 0.7])[None]
    mask = torch.tensor([[True]])
    assert retention(reference, student, mask).item() == pytest.approx(0.6 * math.log(2) + 0.4 * math.log(4 / 7), abs=1e-12)
    assert retention(reference, reference + 3.0, mask).item() == pytest.approx(0.0, abs=1e-12)


def test_state_distillation_by_hand():
    """Two layers, one answer of two tokens: squared distance over the teacher's squared length, mean over layers, then over tokens."""
    teacher = torch.tensor([[[[3.0, 4.0], [1.0, 0.0]]], [[[0.0, 2.0], [2.0, 0.0]]]])
    student = torch.tensor([[[[3.0, 5.0], [1.0, 0.0]]], [[[1.0, 2.0], [0.0, 0.0]]]])
    first, second = (1 / 25 + 1 / 4) / 2, (0 / 1 + 4 / 4) / 2
    assert state_distillation(teacher, student, torch.tensor([[True, True]])).item() == pytest.approx((first + second) / 2)
    assert state_distillation(teacher, student, torch.tensor([[True, False]])).item() == pytest.approx(first)
    assert state_distillation(10 * teacher, 10 * student, torch.tensor([[True, True]])).item() == pytest.approx((first + second) / 2)


def test_state_distillation_teaches_the_student_only():
    teacher, student = torch.randn(2, 1, 2, 3, requires_grad=True), torch.randn(2, 1, 2, 3, requires_grad=True)
    state_distillation(teacher, student, torch.tensor([[True, False]])).backward()
    assert teacher.grad is None
    assert student.grad[:, 0, 0].abs().min() > 0 and student.grad[:, 0, 1].abs().sum() == 0
    at = teacher[:, 0, 0]
    by_hand = 2 * (student[:, 0, 0] - at) / at.square().sum(-1, keepdim=True) / 2
    torch.testing.assert_close(student.grad[:, 0, 0], by_hand.detach())


def test_gradients():
    torch.manual_seed(0)
    student = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 4, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)
    targets = torch.randint(0, 5, (3, 4)).masked_fill(~mask, -100)
    assert torch.autograd.gradcheck(lambda s: counterfactual_ce(s, targets), student)
    assert torch.autograd.gradcheck(lambda s: knockout_distillation(teacher, s, mask), student)
    assert torch.autograd.gradcheck(lambda s: retention(teacher, s, mask), student)


def test_no_gradient_reaches_the_teacher_or_padding():
    teacher = torch.randn(1, 2, 3, requires_grad=True)
    student = torch.randn(1, 2, 3, requires_grad=True)
    knockout_distillation(teacher, student, torch.tensor([[True, False]])).backward()
    assert teacher.grad is None
    assert student.grad[0, 0].abs().sum() > 0 and student.grad[0, 1].abs().sum() == 0


def test_gradient_of_distillation_is_student_minus_teacher():
    """d KL(p‖softmax(z)) / dz = softmax(z) − p."""
    teacher, student = torch.randn(1, 1, 6, dtype=torch.float64), torch.randn(1, 1, 6, dtype=torch.float64, requires_grad=True)
    knockout_distillation(teacher, student, torch.tensor([[True]])).backward()
    torch.testing.assert_close(student.grad, student.softmax(-1) - teacher.softmax(-1))


def test_each_answer_counts_the_same():
    values = torch.tensor([[4.0, 0.0, 0.0, 0.0], [2.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    assert mean_over_answers(values, mask).item() == 1.5


def test_minus_infinity_logits_in_padding_do_not_poison():
    logits = torch.zeros(1, 2, 3, requires_grad=True)
    masked = logits.clone()
    masked[0, 1] = float("nan")
    loss = counterfactual_ce(masked, torch.tensor([[1, -100]]))
    assert loss.item() == pytest.approx(math.log(3))


def test_an_answer_without_tokens_is_refused():
    with pytest.raises(ValueError, match="without a single token"):
        counterfactual_ce(torch.zeros(1, 2, 3), torch.full((1, 2), -100))


def test_total_by_hand():
    terms = {"a": torch.tensor(2.0), "b": torch.tensor(3.0)}
    assert total(terms, {"a": 0.5, "b": 2.0, "c": 9.0}).item() == 7.0
