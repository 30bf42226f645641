"""The real programs on hosts of their own, and everything that can go wrong between hosts."""
