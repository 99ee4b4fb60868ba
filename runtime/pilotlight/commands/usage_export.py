"""`pilotlight usage export`."""

from __future__ import annotations

import csv
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from pilotlight.config import load_settings
from pilotlight.errors import ConfigError

if TYPE_CHECKING:
    from pilotlight.metering.record import UsageRecord

GROUP_RECORDS = 10_000
"""How many records are in memory at a time."""


@click.command("export", short_help="Write the records as CSV, JSON lines, Parquet or signed receipts.")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), required=False)
@click.option("--format", "form", type=click.Choice(["csv", "jsonl", "parquet", "jws"]), default="jsonl",
              show_default=True)  # fmt: skip
@click.option("--ledger", help="The usage ledger [default: pilotlight.db].")
def export_records(file: Path | None, form: str, ledger: str | None) -> None:
    """Write all usage records, the latest first, into FILE or to standard output.

    Parquet needs a FILE and the extra `pilotlight[parquet]`. `jws` are signed receipts, the earliest first.
    """
    from pilotlight.metering.database import located
    from pilotlight.metering.ledger_reader import LedgerReader

    if form == "parquet" and file is None:
        raise click.UsageError("parquet is written into a FILE")
    with LedgerReader(located(load_settings(None, ledger=ledger).host.ledger)) as reader:
        if form == "parquet":
            assert file is not None
            _write_parquet(file, reader.records())
        elif form == "csv":
            _write_csv(file, reader.records())
        else:
            lines = reader.receipts() if form == "jws" else _json_lines(reader.records())
            _write_lines(file, lines)


def _json_lines(records: Iterator[UsageRecord]) -> Iterator[str]:
    return (msgspec.json.encode(record).decode() for record in records)


def _write_lines(file: Path | None, lines: Iterator[str]) -> None:
    with click.open_file("-" if file is None else str(file), "w", encoding="utf-8") as out:
        out.writelines(f"{line}\n" for line in lines)


def _write_csv(file: Path | None, records: Iterator[UsageRecord]) -> None:
    from pilotlight.metering.record import UsageRecord

    with click.open_file("-" if file is None else str(file), "w", encoding="utf-8") as out:
        writer = csv.DictWriter(out, [field.name for field in msgspec.structs.fields(UsageRecord)], lineterminator="\n")
        writer.writeheader()
        for record in records:
            writer.writerow(msgspec.to_builtins(record))
    sys.stdout.flush()


def _write_parquet(file: Path, records: Iterator[UsageRecord]) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError("Parquet needs pyarrow: pip install 'pilotlight[parquet]'") from error
    schema = _arrow_schema(pa)
    with pq.ParquetWriter(file, schema) as writer:
        while group := list(itertools.islice(records, GROUP_RECORDS)):
            writer.write_table(pa.Table.from_pylist([msgspec.to_builtins(record) for record in group], schema))


def _arrow_schema(pa: Any) -> Any:
    """Return the record's fields as Arrow knows them: texts, 64-bit integers and doubles; some may be missing."""
    from pilotlight.metering.record import UsageRecord

    kinds = {"int": pa.int64(), "float": pa.float64()}
    return pa.schema(
        [(field.name, kinds.get(_kind(field.type), pa.string())) for field in msgspec.structs.fields(UsageRecord)]
    )


def _kind(annotation: Any) -> str:
    names = {getattr(part, "__name__", "") for part in getattr(annotation, "__args__", (annotation,))}
    return next((name for name in ("int", "float") if name in names), "str")
