"""Endpoints that implement the protocols of other services."""
