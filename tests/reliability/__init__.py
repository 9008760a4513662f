"""Whether the running service keeps what it promises under overload, faults and long runs."""
