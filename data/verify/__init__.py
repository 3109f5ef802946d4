"""Checks of single traces: correctness by domain, and the filters of form."""
