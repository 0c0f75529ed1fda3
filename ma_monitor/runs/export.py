"""A run as a long table, for those who work in pandas or a spreadsheet."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ma_monitor.errors import ConfigError, MissingExtraError
from ma_monitor.runs.files import replace_file
from ma_monitor.runs.history import Stack

if TYPE_CHECKING:
    import pandas as pd


def to_frame(stack: Stack, first_layer: int) -> pd.DataFrame:
    """One row for each step, layer and sequence, in that order.

    Args:
        stack: The measurements.
        first_layer: Layer number of the first row.

    Returns:
        Columns ``step``, ``layer``, ``sequence`` (from 0), ``top1`` … ``topk`` (magnitudes) and ``median``.

    Raises:
        MissingExtraError: If pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise MissingExtraError("pandas", "report") from error
    steps, rows, sequences, ranks = stack.top.shape
    columns = {
        "step": np.repeat(stack.steps, rows * sequences),
        "layer": np.tile(np.repeat(np.arange(first_layer, first_layer + rows), sequences), steps),
        "sequence": np.tile(np.arange(sequences), steps * rows),
    }
    tops = {f"top{rank + 1}": np.abs(stack.top[..., rank]).ravel() for rank in range(ranks)}
    return pd.DataFrame({**columns, **tops, "median": stack.median.ravel()})


def write_frame(path: Path, frame: Callable[[], pd.DataFrame]) -> None:
    """Writes a table as CSV or Parquet, by the name's ending, in place of what was there.

    Args:
        path: ``….csv`` or ``….parquet``.
        frame: Makes the table, once the name is known to be good.

    Raises:
        ConfigError: If the name ends otherwise.
        MissingExtraError: If pandas or pyarrow is not installed.
        OSError: If the file cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix == ".csv":
        table = frame()
        replace_file(path, lambda file: table.to_csv(file, index=False))
    elif suffix == ".parquet":
        if find_spec("pyarrow") is None:
            raise MissingExtraError("pyarrow", "report")
        table = frame()
        replace_file(path, lambda file: table.to_parquet(file, engine="pyarrow", index=False))
    else:
        raise ConfigError(f"a run is exported to a name that ends in .csv or .parquet, got {path.name!r}")
