"""Section 3 of the paper: the score-aware quantization loss."""
