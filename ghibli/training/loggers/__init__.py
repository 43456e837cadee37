"""Dashboards that show a run while it trains: W&B, TensorBoard, trackio. None of them can end a run."""
