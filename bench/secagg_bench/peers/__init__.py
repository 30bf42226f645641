"""Other ways to sum updates, each run by its own code, in an environment of its own where it must.

`worker` runs one of `systems` and knows nothing of the rest of this project; `environments` makes
the virtual environments from `requirements`; `driving` is what a benchmark talks to.
"""
