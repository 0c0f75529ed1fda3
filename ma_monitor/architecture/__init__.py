"""Before training: from a configuration to trajectories, and what decides them."""
