"""Image files and tensors: read, resize, lay out, find near-duplicates."""
