"""Measurements the documentation quotes. Each prints what it saw; none asserts a time."""
