"""A deterministic simulation of the real services under faults: see docs/robustness.md.

Network, clock, threads and the death of processes are simulated; everything else is the code that
runs in production. One run is a function of its `Run`, and takes a second or less.
"""
