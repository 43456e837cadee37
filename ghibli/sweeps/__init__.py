"""Many runs: grids, searches, ranking, effects, comparison tables."""
