"""What several rooms need: errors, files, seeds, progress, provenance."""
