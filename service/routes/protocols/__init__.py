"""Endpoints that follow other services' protocols."""
