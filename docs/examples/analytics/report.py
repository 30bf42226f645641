"""What follows from the sums that `secagg-server task sums` has written."""

import sys

import numpy as np
from shops import show

with np.load(sys.argv[1], allow_pickle=False) as sums:
    print(int(sums["contributors"]), "shops")
    show(sums)
