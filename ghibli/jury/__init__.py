"""A blind comparison by eye: a page of image pairs to vote on, and what the votes say."""
