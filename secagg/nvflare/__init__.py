"""NVFlare with encrypted aggregation: two filters on each client, one aggregator on the server.

They stand where NVFlare's own filters for homomorphic encryption would: `SecaggJoin` among a
client's task data filters, `SecaggEncryptor` among its task result filters, and `SecaggAggregator`
as the aggregator of ScatterAndGather, FedAvg or FedOpt. NVFlare keeps the rest: who is asked, how
messages travel, what its optimiser makes of the mean. Neither its server nor its controllers ever
see a client's update; a key holder of its own process (`secagg-keyholder run`) opens the sums.
"""

import os

from secagg.extras import require

require("nvflare", "nvflare")

# NVFlare's simulator forks while its server is connected to the key holder. What gRPC does to go on
# in the child can stop it before it becomes the program that it is meant to be.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from secagg.nvflare.client import SecaggEncryptor, SecaggJoin  # noqa: E402
from secagg.nvflare.server import SecaggAggregator  # noqa: E402

__all__ = ["SecaggAggregator", "SecaggEncryptor", "SecaggJoin"]
