"""What people look at: figures of runs, fits and forecasts."""
