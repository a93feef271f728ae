"""Small batches through shared memory for long, either side killed at random: `python -m tests.soak`."""
