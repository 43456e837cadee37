"""The LightningModule, its callbacks, and one training session from lock to result."""
