"""Shared by several rooms: errors, files, loading, progress, provenance, seeds."""
