"""The attack gallery: what poisoning does to the recommender, and which layer stops it.

`attacks` changes what a client trained, `malformed` what it uploads (with `uploads` of the
attacker's making); `federation` trains with attackers among the clients, `run` measures it all, and
`report` writes the table and the figure.
"""
