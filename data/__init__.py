"""What a sample is, where samples come from, how counterfactuals are made: start at `data.clips` and `data.build`."""
