"""The same quantities without prefix reuse, batches or caches: one whole forward pass for every clip, question, answer and cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.preprocessing import StandardScaler

from data.questions import answer, question


def sequence(model, clips, clip, suffix, **streams):
    """A whole prompt with these question and answer rows."""
    return replace(model.sequence(model.media(clip, clips.root, **streams), question("hear"), ""), suffix=suffix)


def probe_accuracy(states, labels, folds, shrinkage=0.1) -> float:
    """Share of clips whose label scikit-learn's discriminant analysis, all classes equally likely, reads from the other part of its fold."""
    labels, right = np.array(labels), 0
    for train, test in folds:
        scaler = StandardScaler().fit(states[train])
        lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(scaler.transform(states[train]), labels[train])
        scores = lda.decision_function(scaler.transform(states[test])).reshape(len(test), -1) - np.log(lda.priors_)
        right += int((lda.classes_[scores.argmax(1)] == labels[test]).sum())
    return right / len(labels)


@torch.no_grad()
def span_score(model, clips, clip, modality, name, cut=None, **streams) -> float:
    """s (docs/definitions.md) of class `name`'s phrase."""
    text, span = answer(modality, *clips.labels()[name])
    batch = model.batch([model.sequence(model.media(clip, clips.root, **streams), question(modality), text, span)])
    logits = model.forward(batch, [(cut,)] if cut else ())[0].log_softmax(-1)
    picked = [float(logits[i, t]) for i, (t, inside) in enumerate(zip(batch.targets[0], batch.span[0], strict=True)) if inside]
    return sum(picked) / len(picked)


@torch.no_grad()
def greedy(model, clips, clip, modality, cut=None, tokens=12, **streams) -> str:
    """Greedy decoding by running everything anew for every token."""
    said: list[int] = []
    for _ in range(tokens):
        suffix = model.suffix(question(modality))
        ids = torch.cat([suffix.ids, torch.tensor(said, dtype=torch.long)])
        kinds = torch.cat([suffix.kinds, torch.full((len(said),), int(suffix.kinds[-1]))])
        targets = torch.zeros(len(said) + 1, dtype=torch.long)
        whole = sequence(model, clips, clip, replace(suffix, ids=ids, kinds=kinds, targets=targets, span=targets.bool()), **streams)
        token = int(model.forward(model.batch([whole]), [(cut,)] if cut else ())[0, -1].argmax())
        if token == model.end_id:
            break
        said.append(token)
    return model.tokenizer.decode(said, skip_special_tokens=True).strip()
