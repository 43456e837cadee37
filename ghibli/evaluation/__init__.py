"""Is it better? Paired gain, distances, diagnosis."""
