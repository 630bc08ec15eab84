"""Inner products with stored rows, and the best of them."""
