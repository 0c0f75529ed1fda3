"""Readers of what comes with massive activations, in the probe's own forward or in a short one beside it."""
