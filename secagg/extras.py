"""What a missing extra says: which package is missing, and what to install. A leaf.

A package that needs an extra asks for it first thing; importing it without gives a
`ModuleNotFoundError` that names the extra, so that who tries an import goes on trying. What is
called rather than imported raises a `ConfigurationError`.
"""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["missing", "require"]


def require(extra: str, *packages: str) -> None:
    """Refuse to go on without these packages, by the names that they are imported by.

    Raises:
        ModuleNotFoundError: one is not installed; the message names the extra that brings it.
    """
    for package in packages:
        if not _found(package):
            raise ModuleNotFoundError(missing(package, extra), name=package)


def missing(package: str, extra: str) -> str:
    """One line on a package that is not there."""
    return f"expected the package {package}; it is not installed; run pip install 'secagg[{extra}]'"


def _found(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False  # something stands in its place that cannot be imported
