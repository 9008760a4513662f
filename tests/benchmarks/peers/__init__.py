"""The peers: each framework's documented pattern around one shared `pipeline`."""
