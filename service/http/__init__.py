"""HTTP plumbing that endpoints share: parameters, uploads, problems, keys, middleware."""
