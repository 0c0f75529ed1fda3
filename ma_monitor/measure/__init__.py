"""Measuring: tensors live here and nowhere else."""
