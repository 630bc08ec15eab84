"""Section 4 of the paper: codebooks learned under the score-aware loss."""
