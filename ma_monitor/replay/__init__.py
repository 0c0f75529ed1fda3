"""Released checkpoints through the same Monitor as live training."""
