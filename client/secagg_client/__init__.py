"""The device: the session that contributes to a server's rounds, and the `secagg-client` command.

`session` needs neither torch nor pandas, so that any program can join a task of its own. What the
recommender computes is in `secagg_recommender`.
"""

from secagg.extras import require

require("service", "grpc", "structlog")
