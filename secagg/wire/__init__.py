"""The wire contract: generated messages in `v1`, and `codec`, which turns them into checked values.

Imports no gRPC; the generated `*_pb2_grpc` modules are for the services alone.
"""
