"""HTTP: one module per family of endpoints, and what they share."""
