"""What a release says of itself, for tests that hold other files to it."""

from __future__ import annotations

from deploy.release import project_version

__all__ = ["project_version"]
