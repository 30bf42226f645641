"""Failed calls as gRPC reports them, and every class of the tree of errors."""

from __future__ import annotations

import grpc
from google.rpc import status_pb2

from secagg.errors import SecaggError

__all__ = ["AnyError", "tree"]


def tree(root: type[SecaggError] = SecaggError) -> list[type[SecaggError]]:
    """A class and everything below it."""
    return [root, *(found for child in root.__subclasses__() for found in tree(child))]


class AnyError(grpc.RpcError):
    """A failed call as gRPC reports it."""

    def __init__(self, code: grpc.StatusCode, status: status_pb2.Status | None = None) -> None:
        self._code = code
        self._metadata = (
            (("grpc-status-details-bin", status.SerializeToString()),) if status else ()
        )
        self._details = status.message if status else "details"

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return self._metadata
