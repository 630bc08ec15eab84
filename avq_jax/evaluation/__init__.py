"""Sections 5 and 7.8 of the paper: exact search, metrics and data sets."""
