"""Selector, reconstructor and objective: Secs. 3 and 4 of the paper."""
