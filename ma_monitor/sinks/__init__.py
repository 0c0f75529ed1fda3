"""Where emissions are shown: W&B, TensorBoard, and whatever else the Trainer reports to."""
