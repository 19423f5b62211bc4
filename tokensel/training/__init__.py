"""One resumable training loop; selector and reconstructor, judges, and the rate predictor of DyRate."""
