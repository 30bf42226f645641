"""The server: coordinates rounds and adds ciphertexts it cannot read.

It never holds a secret key and never imports code that could use one; an import contract checks
that. Read `states` first (what a round goes through), then `coordinator`.
"""

from secagg.extras import require

require("service", "grpc", "pydantic", "structlog")
