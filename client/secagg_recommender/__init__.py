"""The recommender: data, models, evaluation and serving, on the device and without a network.

Knows nothing of sessions, keys or ciphertexts: what it has to contribute are arrays, which
`secagg_client` encrypts and sends.
"""

from secagg.extras import require

require("client", "pandas", "scipy", "torch")
