"""The benchmarks run, and what they compare gives the same losses and gradients."""

from benchmarks.train_step import main


def test_a_step_of_training_on_a_tiny_model(capsys):
    ratios = main(["--quick", "--seconds", "2"])
    assert set(ratios) == {
        *(f"{what}, {name}" for what in ("time", "first", "memory") for name in ("plain", "shared")),
        *(f"rate, {name}, {questions}" for name in ("shared", "recipe") for questions in (2, 4)),
    }
    # Times on a machine that others share are no test, but what they are made of is: more sequences are trained, on one prefix.
    assert ratios["memory, shared"] > 1 and ratios["memory, plain"] < ratios["memory, shared"] and ratios["rate, shared, 4"] > 1
    printed = capsys.readouterr().out
    assert "losses agree" in printed and printed.index("losses agree") < printed.index("peak memory")
