"""The offline half: trains the networks in PyTorch and exports them for the service."""
