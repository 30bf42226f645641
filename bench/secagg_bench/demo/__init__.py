"""`secagg demo`: encrypted federated training on real data, beside everything it competes with.

`settings` says what runs, `federation` runs the real programs, `clear` computes the same sums
without ever importing the cipher, `results` puts them side by side, `report` shows them.
"""
