"""Tables as CSV in UTF-8, read strictly."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cxrgaze.errors import DataError


def csv_rows(
    path: Path, needed: Sequence[str], optional: Sequence[str] | None
) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a CSV file in UTF-8, each with its line number, one at a time.

    Args:
        needed: columns that must be there.
        optional: further columns that may be there; None allows any.

    Raises:
        DataError: missing, no CSV, another header, or a row of another length.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            header = list(reader.fieldnames or ())
            missing = [name for name in needed if name not in header]
            allowed = header if optional is None else (*needed, *optional)
            foreign = [name for name in header if name not in allowed]
            if missing or foreign or len(set(header)) != len(header):
                raise DataError(
                    f"{path}: columns missing {missing}, not expected {foreign}; "
                    f"expected {[*needed]}, optional {list(optional or ())}"
                )
            for cells in reader:
                if None in cells or None in cells.values():
                    raise DataError(f"{path}, row {reader.line_num}: {len(header)} cells expected")
                yield reader.line_num, cells
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8: {error}") from error


def csv_header(path: Path) -> list[str]:
    """Names of the columns of a CSV file.

    Raises:
        DataError: as `csv_rows`.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file, strict=True).fieldnames or ())
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8: {error}") from error


def write_csv(path: Path, columns: Sequence[str], records: Iterable[Mapping[str, Any]]) -> None:
    """Write records with these columns as `csv_rows` reads them."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
