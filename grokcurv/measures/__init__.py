"""What is measured along a training run: a file a measure, for any number of runs at once."""
