"""What past runs teach: packaged runs and what is learned from them."""
