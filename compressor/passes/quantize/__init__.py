"""Round weights, and keys and values of the cache, to the numbers of a format."""
