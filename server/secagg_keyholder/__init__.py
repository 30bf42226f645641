"""The key holder: a process of its own, the only one that can open a sum.

It opens one sum a round, over a list of receipts it has checked itself, and nothing else. It keeps
its secrets in memory; a restart forgets them, and open rounds are abandoned.
"""
