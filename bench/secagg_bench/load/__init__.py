"""What the services bear: many clients at once, hostile ones, and an hour without a break.

The real programs over mutual TLS, on one machine. `vitals` measures them from outside, `probing`
asks for their health; `uploads`, `hostile` and `soak` are the three experiments, `report` writes
their tables and `figures` draws them.
"""
