"""Iterated local search for additive codes."""
