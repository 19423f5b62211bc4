"""What an answer and a training step take, measured."""
