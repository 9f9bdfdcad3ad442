"""What is minimised: one function a term, each with its formula and where it comes from.

Every term averages over the tokens of an answer first and over answers second, so a long answer weighs as much as a short one, and equally large
parts of a batch (accumulation, processes) average to the loss of the whole. Logits are those of the emitters: row t emits answer token t.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100  # target of a padded position


def counterfactual_ce(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the designated answer: mean over answers of (1/|y|) Σ_t −log p(y_t | clip, question, y_<t), in nats.

    On hear-questions y tells what sounds, on see-questions what is seen, in all four cells of a grid; so in the swapped cells the picture alone is
    no longer a way to the answer. Supervised fine-tuning on both swap directions, as in DMC-Repair and MMA-Bench tuning.

    logits: (answers, tokens, vocabulary). targets: (answers, tokens) token ids, -100 where padded. Raises ValueError on an answer without tokens.
    """
    mask = targets != IGNORED
    chosen = functional.log_softmax(logits, dim=-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    return mean_over_answers(-chosen, mask)


def knockout_distillation(teacher_logits: Tensor, student_logits: Tensor, mask: Tensor) -> Tensor:
    """Knockout self-distillation: mean over answers of (1/|ŷ|) Σ_t KL( sg p(·| ŷ_<t, cut) ‖ p_θ(·| ŷ_<t) ), in nats, whole vocabulary, temperature 1.

    The teacher is the frozen model (adapter off) with one stream cut off by attention knockout (Geva et al. 2023, arXiv 2304.14767): the picture on
    hear-questions, the sound on see-questions (the mirror). ŷ is the teacher's own greedy answer under that cut, so no label is used. The student
    sees everything and learns to answer as if it had not looked. Defined by this project; distillation as in Hinton et al. 2015 (arXiv 1503.02531).

    teacher_logits, student_logits: (answers, tokens, vocabulary); no gradient reaches the teacher. mask: (answers, tokens) True at emitters of ŷ.
    """
    teacher = functional.log_softmax(teacher_logits.detach(), dim=-1)
    student = functional.log_softmax(student_logits, dim=-1)
    return mean_over_answers((teacher.exp() * (teacher - student)).sum(-1), mask)


def state_distillation(teacher_states: Tensor, student_states: Tensor, mask: Tensor) -> Tensor:
    """Knockout self-distillation of states: mean over answers of (1/|ŷ|) Σ_t (1/|L|) Σ_{l∈L} ‖h_l,t − sg h_l,t^cut‖² / ‖h_l,t^cut‖².

    L: the layers from the cut's first on; h: what they put out at the emitters of ŷ. Where picture and sound agree, cut and uncut model give nearly
    the same distribution, so its KL has little to teach; their states differ by what came through the cut paths, and that is what is taken out.
    Defined by this project; states as targets as in FitNets (Romero et al. 2015, arXiv 1412.6550), relative so that layers weigh alike.

    teacher_states, student_states: (layers, answers, tokens, hidden); no gradient reaches the teacher. mask: (answers, tokens).
    """
    teacher = teacher_states.detach().float()
    distance = (student_states.float() - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(1e-12)
    return mean_over_answers(distance.mean(0), mask)


def retention(reference_logits: Tensor, student_logits: Tensor, mask: Tensor) -> Tensor:
    """Retention: mean over answers of (1/|ŷ|) Σ_t KL( sg p_adapter-off(·| ŷ_<t) ‖ p_θ(·| ŷ_<t) ), in nats, nothing cut.

    On see-questions about factual clips, where the frozen model is right, it is its own best guard: ŷ is its greedy answer, so no label is used.
    (On hear-questions the distribution has to change: there it says how far the picture was trusted.) The KL anchor of
    Li & Hoiem 2016 (arXiv 1606.09282, learning without forgetting), towards the whole distribution. Shapes as in `knockout_distillation`.
    """
    return knockout_distillation(reference_logits, student_logits, mask)


def mean_over_answers(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the True tokens of each answer, then over answers. values, mask: (answers, tokens). Raises ValueError on an answer without tokens."""
    if values.shape != mask.shape:
        raise ValueError(f"values are {tuple(values.shape)} but the mask is {tuple(mask.shape)}.")
    count = mask.sum(-1)
    if not bool((count > 0).all()):
        raise ValueError("an answer without a single token cannot be averaged.")
    return (values.masked_fill(~mask, 0.0).sum(-1) / count).mean()


def total(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Σ weight · term over the terms given."""
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()
