"""The benchmarks run, and what they compare gives the same losses and gradients."""

import pytest
import torch

from benchmarks.train_step import main


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_step_of_training_on_a_tiny_model(capsys):
    ratios = main(["--quick", "--seconds", "2"])
    assert set(ratios) == {
        *(f"{what}, {name}" for what in ("time", "first", "memory") for name in ("plain", "shared")),
        *(f"rate, {name}, {questions}" for name in ("shared", "recipe") for questions in (2, 4)),
    }
    # Times on a machine that others share are no test; memory is: the recipe has more sequences, and one media prefix instead of two.
    assert ratios["memory, shared"] > 1 and ratios["memory, plain"] < ratios["memory, shared"]
    printed = capsys.readouterr().out
    assert printed.index("losses agree") < printed.index("peak memory")
