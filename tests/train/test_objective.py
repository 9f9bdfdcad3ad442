"""Every term against numbers worked out by hand, and its gradient against finite differences."""

import math

import pytest
import torch

from train.objective import (
    attention_balance,
    base_divergence,
    counterfactual_ce,
    grid_hinge,
    invariance,
    knockout_distillation,
    latent_readout,
    logprob_invariance,
    mean_over_answers,
    retention,
    sensitivity,
    state_distillation,
    swap_preference,
    total,
)


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


def test_grid_hinge_by_hand():
    """Short by 0.5, by nothing, and with the wrong answer ahead by 1: max(0, 1 - (right - wrong)) = 0.5, 0, 2."""
    right, wrong = torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-1.5, -3.0, -2.0])
    assert grid_hinge(right, wrong).item() == pytest.approx((0.5 + 0 + 2) / 3)


def test_swap_preference_by_hand():
    """Chosen gained 2 nats, rejected lost 3 against the reference: -log sigmoid(0.1 * 5)."""
    value = swap_preference(torch.tensor([-4.0]), torch.tensor([-9.0]), torch.tensor([-6.0]), torch.tensor([-6.0]))
    assert value.item() == pytest.approx(math.log(1 + math.exp(-0.5)))
    same = torch.tensor([-4.0, -1.0])
    assert swap_preference(same, same, same, same).item() == pytest.approx(math.log(2))


def test_swap_preference_leaves_the_reference_alone():
    chosen, rejected, ref = (torch.zeros(1, requires_grad=True) for _ in range(3))
    swap_preference(chosen, rejected, ref, ref).backward()
    assert ref.grad is None and chosen.grad.item() < 0 < rejected.grad.item()


def test_invariance_by_hand_teaches_the_swapped_cell_only():
    here, swapped = logits_of([0.75, 0.25])[None].requires_grad_(), logits_of([0.5, 0.5])[None].requires_grad_()
    value = invariance(here, swapped, torch.tensor([[True]]))
    assert value.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    value.backward()
    assert here.grad is None and swapped.grad.abs().sum() > 0


def test_logprob_invariance_by_hand_counts_words_that_are_not_said():
    """log p falls by ln 1.5 for the first word and rises by ln 2 for the second. A word of 1 % in place of 0.1 % is hardly anything to KL."""
    here, swapped = logits_of([0.75, 0.25])[None].requires_grad_(), logits_of([0.5, 0.5])[None].requires_grad_()
    value = logprob_invariance(here, swapped, torch.tensor([[True]]))
    assert value.item() == pytest.approx((math.log(1.5) ** 2 + math.log(2) ** 2) / 2)
    value.backward()
    assert here.grad is None and swapped.grad.abs().sum() > 0
    rare, rarer = logits_of([0.99, 0.01])[None], logits_of([0.999, 0.001])[None]
    assert invariance(rare, rarer, torch.tensor([[True]])).item() < 0.02 < 2 < logprob_invariance(rare, rarer, torch.tensor([[True]])).item()


def test_sensitivity_by_hand_is_bounded():
    """Two answers: the first diverges by 0.13 nats (0.87 short of 1), the second by 1.76, which is enough."""
    here = torch.stack([logits_of([0.75, 0.25]), logits_of([0.9, 0.1])])
    swapped = torch.stack([logits_of([0.5, 0.5]), logits_of([0.1, 0.9])]).requires_grad_()
    first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert 0.9 * math.log(9) + 0.1 * math.log(1 / 9) > 1
    value = sensitivity(here, swapped, torch.tensor([[True], [True]]))
    assert value.item() == pytest.approx((1 - first) / 2)
    value.backward()
    assert swapped.grad[0].abs().sum() > 0 and swapped.grad[1].abs().sum() == 0


def test_base_divergence_by_hand():
    """Margins 2, and capped at -s(y|v) = 0.5: max(0, 2 - (−1 + 4)) = 0, max(0, 2 - (−3 + 4)) = 1, max(0, 0.5 - (−0.2 + 0.5)) = 0.2."""
    heard, unheard = torch.tensor([-1.0, -3.0, -0.2], requires_grad=True), torch.tensor([-4.0, -4.0, -0.5], requires_grad=True)
    value = base_divergence(heard, unheard)
    assert value.item() == pytest.approx((0 + 1 + 0.2) / 3)
    value.backward()
    assert unheard.grad is None and heard.grad.tolist() == pytest.approx([0, -1 / 3, -1 / 3])


def test_latent_readout_by_hand():
    """One layer, two answers; the first has one question row and a label of two tokens, the second two rows and one token."""
    lens = torch.stack([logits_of([0.5, 0.25, 0.25], [0.2, 0.2, 0.6]), logits_of([0.1, 0.8, 0.1], [0.5, 0.3, 0.2])])[None]
    rows, targets = torch.tensor([[True, False], [True, True]]), torch.tensor([[-100, 0, 1], [-100, 1, -100]])
    first, second = -(math.log(0.5) + math.log(0.25)) / 2, -(math.log(0.8) + math.log(0.3)) / 2
    assert latent_readout(lens, rows, targets).item() == pytest.approx((first + second) / 2)
    two_layers = torch.cat([lens, lens.roll(1, -1)])
    assert latent_readout(two_layers, rows, targets).item() != pytest.approx((first + second) / 2)


def test_attention_balance_by_hand():
    """Audio's shares 0.25 and 0.6 in one layer, 0.5 and 0 in the other: short by 0.25, 0, 0, 0.5."""
    mass = torch.tensor([[[0.1, 0.3], [0.3, 0.2]], [[0.2, 0.2], [0.0, 0.4]]])
    assert attention_balance(mass).item() == pytest.approx((0.25 + 0 + 0 + 0.5) / 4)


@pytest.mark.parametrize(
    "term",
    [
        lambda x: grid_hinge(x[:, 0], x[:, 1]),
        lambda x: swap_preference(x[:, 0], x[:, 1], torch.zeros(3), torch.ones(3)),
        lambda x: invariance(torch.ones(3, 1, 4).double(), x[:, None], torch.ones(3, 1, dtype=torch.bool)),
        lambda x: logprob_invariance(torch.ones(3, 1, 4).double(), x[:, None], torch.ones(3, 1, dtype=torch.bool)),
        lambda x: sensitivity(torch.arange(12).reshape(3, 1, 4).double() / 9, x[:, None], torch.ones(3, 1, dtype=torch.bool)),
        lambda x: base_divergence(x[:, 0], -torch.ones(3).double() * 3),
        lambda x: latent_readout(x[None, :, None], torch.ones(3, 1, dtype=torch.bool), torch.tensor([[0, 2], [1, -100], [3, 3]])),
        lambda x: attention_balance(x[None, :, :2].exp()),
    ],
)
def test_gradients_against_finite_differences(term):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.5
    assert torch.autograd.gradcheck(term, x.requires_grad_())
