"""Search of quantized rows in the leaves of a k-means tree."""
