"""What massive activations do: a model's loss and quantisation with and without them."""
