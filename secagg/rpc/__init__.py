"""What client, server and key holder share about gRPC. A leaf: nothing in the library imports it.

Needs the extra ``rpc``. `channels` builds every connection and listener, `status` carries errors
across them, `retry` says when to try again.
"""

from secagg.extras import require

require("rpc", "grpc", "grpc_status", "grpc_health")
