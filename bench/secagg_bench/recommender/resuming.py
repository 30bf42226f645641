"""What a measurement in sections has to measure still: all of them, or what is asked for anew."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from secagg.errors import InputError

__all__ = ["resumed"]


def resumed(
    output: Path, data_dir: Path | None, only: Sequence[str] | None, sections: Collection[str]
) -> tuple[Path, dict[str, Any], list[str]]:
    """The folder of the data, what is in the result file already, and which sections to measure.

    Raises:
        InputError: no folder, or a section that there is not.
    """
    if data_dir is None:
        raise InputError("expected the folder of the data sets; got none; set SECAGG_DATA_DIR")
    if unknown := sorted(set(only or ()) - set(sections)):
        raise InputError(f"expected sections of {sorted(sections)}; got {unknown}")
    found = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
    return data_dir, found, list(only or [name for name in sections if name not in found])
