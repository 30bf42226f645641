"""What client-level differential privacy costs the recommender, where every client is one user.

`population` says who trains, `mechanism` how their contributions become a noisy mean, `ranking` how
good the outcome is. `federated` (matrix factorisation), `default_training` (federated averaging as
the client library trains it) and `cooccurrence` (one release of a co-occurrence table) learn;
`membership` attacks what they release. `settings` holds what `tuning` chose, `run` measures
everything, `report` writes tables and the figure. All in the clear and in one process: nothing here
may be used by a service.
"""
