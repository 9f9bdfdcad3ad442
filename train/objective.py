"""What is minimised: one function a term, each with its formula, where it comes from and what it costs a step beside plain fine-tuning.

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

    Abstention is the same on questions about a stream that was taken away, where y says "nothing", together with `retention` on questions about the
    stream that is left; without that the model says "nothing" about both.

    logits: (answers, tokens, vocabulary). targets: (answers, tokens) token ids, -100 where padded. Raises ValueError on an answer without tokens.
    Cost: none beside fine-tuning; abstention one more clip to a group of four.
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
    Cost: one forward pass of the prefix without gradients, shared by all terms with a frozen model in them, and the answer's rows; each answer is
    decoded once in a run.
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
    Cost: none beside distillation; the states are there.
    """
    teacher = teacher_states.detach().float()
    distance = (student_states.float() - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(1e-12)
    return mean_over_answers(distance.mean(0), mask)


def retention(reference_logits: Tensor, student_logits: Tensor, mask: Tensor) -> Tensor:
    """Retention: mean over answers of (1/|ŷ|) Σ_t KL( sg p_adapter-off(·| ŷ_<t) ‖ p_θ(·| ŷ_<t) ), in nats, nothing cut.

    On see-questions about factual clips, where the frozen model is right, it is its own best guard: ŷ is its greedy answer, so no label is used.
    So it is on what is left of a muted or blanked clip (as part of abstention); there the frozen model is not given the empty stream at all.
    (On hear-questions the distribution has to change: there it says how far the picture was trusted.) The KL anchor of
    Li & Hoiem 2016 (arXiv 1606.09282, learning without forgetting), towards the whole distribution. Shapes and cost as in `knockout_distillation`.
    On plain text (`text_retention`) ŷ is the text itself; cost: its own sequence, with and without the adapter.
    """
    return knockout_distillation(reference_logits, student_logits, mask)


def grid_hinge(right: Tensor, wrong: Tensor, margin: float = 1.0) -> Tensor:
    """Grid hinge: mean over answers of max(0, τ − [s(y*) − s(ȳ)]), τ = 1 nat a token, in all four cells of a grid.

    s: log-likelihood of the label's tokens divided by their number. y*: the designated label of the cell; ȳ: that of the other clip of the grid.
    After DMC-Repair (docs/definitions.md). right, wrong: (answers,). Cost: a second answer to every question.
    """
    return (margin - (right - wrong)).clamp_min(0.0).mean()


def swap_preference(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float = 0.1) -> Tensor:
    """Swap preference: mean over answers of −log σ(β [(log p(y_c) − log p_off(y_c)) − (log p(y_r) − log p_off(y_r))]), β = 0.1; conflict cells only.

    y_c: the designated answer; y_r: what the other stream suggests; p_off: the model with its adapter off. DPO (Rafailov et al. 2023, arXiv
    2305.18290) on swapped streams, after OmniDPO. All (answers,), summed over an answer's tokens. Cost: a second answer, both also through the
    frozen model.
    """
    gain = (chosen - reference_chosen.detach()) - (rejected - reference_rejected.detach())
    return -functional.logsigmoid(beta * gain).mean()


def invariance(here: Tensor, swapped: Tensor, mask: Tensor) -> Tensor:
    """Invariance: mean over answers of (1/|ŷ|) Σ_t KL( sg p(·| ŷ_<t, cell) ‖ p(·| ŷ_<t, cell with the stream not asked about swapped) ).

    ŷ: the teacher's own answer in the cell. After MoD-DPO. Shapes as in `knockout_distillation`. Cost: the same answer in a second cell.
    """
    return knockout_distillation(here, swapped, mask)


def logprob_invariance(here: Tensor, swapped: Tensor, mask: Tensor) -> Tensor:
    """Log-probability invariance: mean over answers of (1/|ŷ|) Σ_t (1/|V|) Σ_w (log p(w| ŷ_<t, swapped) − sg log p(w| ŷ_<t, cell))².

    KL weighs each word by its probability, so a label that the picture suggests and that is no longer said hardly counts, though how unlikely it
    is still follows the picture; that is what E_V and the Shortcut Index measure. Here all words count alike. Defined by this project. Shapes and
    cost as in `invariance`.
    """
    teacher, student = functional.log_softmax(here.detach(), dim=-1), functional.log_softmax(swapped, dim=-1)
    return mean_over_answers((student - teacher).square().mean(-1), mask)


def sensitivity(here: Tensor, swapped: Tensor, mask: Tensor, bound: float = 1.0) -> Tensor:
    """Bounded sensitivity: mean over answers of max(0, κ − (1/|ŷ|) Σ_t KL( sg p(·| ŷ_<t, cell) ‖ p(·| ŷ_<t, swapped) )).

    swapped: the same with the other sound on hear-questions, the other picture on see-questions. κ = 1 nat a token: beyond it
    nothing is gained, so that the term cannot grow without end. After MoD-DPO. Shapes and cost as in `invariance`.
    """
    teacher, student = functional.log_softmax(here.detach(), dim=-1), functional.log_softmax(swapped, dim=-1)
    divergence = (teacher.exp() * (teacher - student)).sum(-1).masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1)
    return (bound - divergence).clamp_min(0.0).mean()


def base_divergence(heard: Tensor, unheard: Tensor, margin: float = 2.0) -> Tensor:
    """Base divergence: mean over answers of max(0, m − [s(y| a, v) − sg s(y| v)]), m = min(2, −s(y| v)), on the label's tokens of hear-questions.

    Words that the model would have said without sound as well give no reason to listen; here the sound has to make them likelier. The cap keeps
    the term reachable: s(y| a, v) cannot exceed 0. s(y| v): adapter off, sound removed. Defined by this project, after the token shift of the paper.
    heard, unheard: (answers,), s in nats a token. Cost: one forward pass of a prefix without its sound, without gradients.
    """
    unheard = unheard.detach()
    return (torch.minimum(torch.full_like(unheard, margin), -unheard) - (heard - unheard)).clamp_min(0.0).mean()


def latent_readout(lens_logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """Latent read-out: mean over answers of the mean over layers, question rows q and label tokens t of −log softmax(W norm(h_l,q))[t].

    The logit lens (through the final norm) at question rows in the plan's causal layers is to name the sound. Defined by this project; deep
    supervision as in Lee et al. 2015 (arXiv 1409.5185). lens_logits: (layers, answers, rows, vocabulary). rows: (answers, rows) True where there is
    one. targets: (answers, tokens) of the label, -100 where padded. Cost: the head at every question row, once a layer.
    """
    logp, mask = functional.log_softmax(lens_logits, dim=-1), targets != IGNORED
    index = targets.clamp_min(0)[None, :, None].expand(*logp.shape[:3], -1)
    by_row = (logp.gather(-1, index) * mask[None, :, None]).sum(-1) / mask.sum(-1)[None, :, None]
    return mean_over_answers(-by_row.mean(0), rows)


def attention_balance(mass: Tensor, share: float = 0.5) -> Tensor:
    """Attention balance: mean over answers and layers of max(0, ½ − A_audio / (A_audio + A_video)), on hear-questions.

    A: attention mass from the emitters, mean over heads. The layers are those where cutting attention to video changes answers (the plan's causal
    ones), not those that merely attend much. mass: (layers, answers, 2), audio and video. Cost: the emitters' attention weights, a second time.
    """
    return (share - mass[..., 0] / mass.sum(-1).clamp_min(1e-12)).clamp_min(0.0).mean()


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
