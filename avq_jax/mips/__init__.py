"""Sections 2 and 5.3 of the paper: the search engine."""
