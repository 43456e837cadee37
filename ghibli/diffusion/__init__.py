"""The formulas: forward process, guidance, losses, samplers."""
