"""Expendable processes that decode and encode photos, and the pool that feeds them."""
