"""Asymmetric distance computation: sums of table entries picked by codes."""
