"""The key holder: a process of its own, the only one that can open a sum.

It opens one sum a round, over a list of receipts it has checked itself, and nothing else. What it
has promised outlives it; the key of a round does not outlive the round.
"""

from secagg.extras import require

require("keyholder", "grpc", "pydantic", "structlog")
