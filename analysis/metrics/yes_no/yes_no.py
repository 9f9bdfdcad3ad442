"""Accuracy, precision, recall, F1 and Yes % of yes/no sets, as a metric of Hugging Face `evaluate`. Computed by analysis.yes_no."""

import datasets
import evaluate

from analysis.yes_no import yes_no

DESCRIPTION = """\
Scores of free answers to yes/no questions ("Is the dog making a sound?"). The first yes or no of an answer counts. Answers with neither are unparsed:
they are in no score but their own share. Yes % (`yes`) beside the set's own share of yes shows a preference for one word."""

INPUTS = """\
predictions: the answers, as text.
references: "yes" or "no" for each.
Returns accuracy, precision, recall, f1, yes, unparsed (shares from 0 to 1, None where nothing is divided by) and n.

>>> metric = evaluate.load("analysis/metrics/yes_no")
>>> metric.compute(predictions=["Yes.", "No, it is silent."], references=["yes", "yes"])["recall"]
0.5
"""

CITATION = """\
@inproceedings{li2023pope,
  title={Evaluating Object Hallucination in Large Vision-Language Models},
  author={Li, Yifan and Du, Yifan and Zhou, Kun and Wang, Jinpeng and Zhao, Wayne Xin and Wen, Ji-Rong},
  booktitle={Proceedings of EMNLP}, year={2023}}"""


class YesNoMetric(evaluate.Metric):
    """See DESCRIPTION and INPUTS."""

    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features)

    def _compute(self, predictions, references):
        words = [reference.strip().lower() for reference in references]
        if strange := sorted(set(words) - {"yes", "no"}):
            raise ValueError(f'references have to be "yes" or "no", not {strange[0]!r}.')
        return yes_no(predictions, [word == "yes" for word in words])._asdict()
