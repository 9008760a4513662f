"""The command line: ``serve``, ``predict``, ``key``."""
