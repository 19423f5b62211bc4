"""Runs the chapters and builds the pages."""
