"""Images, frozen encoders, and the features on their way to training."""
