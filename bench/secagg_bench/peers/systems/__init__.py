"""The systems that a worker can run, a module each, with a class ``System`` (see `worker.System`).

They load in environments without this project, so they use nothing of it but `_flat`, and load
their own libraries when they are set up.
"""
