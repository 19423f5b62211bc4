"""Time and memory of answers and of training steps, measured."""
