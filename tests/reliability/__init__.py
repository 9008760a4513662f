"""Whether the running service meets its targets under overload, after crashes and in long runs."""
