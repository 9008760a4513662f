"""Metrics, logs, traces and timings."""
