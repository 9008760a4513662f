"""The peers: each framework's own documented pattern around one shared `pipeline`."""
