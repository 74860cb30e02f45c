"""Does the query answer the question? It is run on a small sqlite database in memory and its rows are compared."""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from aligntune.errors import RewardError

from .base import adversarial, bad, good, reward
from .words import after_thinking, block_in, fenced_blocks

READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
BYTES, ROWS = 1 << 20, 10_000

Row = tuple[Any, ...]


class Refused(Exception):
    """The query is wrong, writes, or takes too long."""


def extract_sql(text: str) -> str:
    """The last SQL code block of an answer (after its thinking), or the whole text."""
    text = after_thinking(text)
    found = block_in(fenced_blocks(text), ("sql", "sqlite"))
    return (text if found is None else found).strip()


def database(schema: str) -> sqlite3.Connection:
    """A fresh database with the column's tables and rows; a schema that does not run is a `RewardError`."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(schema)
    except sqlite3.Error as error:
        connection.close()
        raise RewardError(f"the column `schema` does not run in sqlite: {error}. Correct or drop the row") from error
    return connection


def query(connection: sqlite3.Connection, sql: str, timeout_s: float) -> list[Row]:
    """The rows of one reading statement. Nothing else is allowed: no write, no file, no pragma, no extension."""
    deadline = time.monotonic() + timeout_s
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, BYTES)
    connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in READS else sqlite3.SQLITE_DENY)
    connection.set_progress_handler(lambda: time.monotonic() > deadline, 1000)
    try:
        cursor = connection.execute(sql)
        rows = cursor.fetchmany(ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError) as error:
        raise Refused(str(error)) from error
    finally:
        connection.set_authorizer(None)
        connection.set_progress_handler(None, 0)
    if len(rows) > ROWS:
        raise Refused(f"more than {ROWS} rows")
    if cursor.description is None:
        raise Refused("the statement returns no rows")
    return rows


def _comparable(rows: Sequence[Row]) -> list[Row]:
    """Rows with real numbers rounded to nine digits: two ways to compute a mean differ in the last bit."""
    return [tuple(float(f"{cell:.9g}") if isinstance(cell, float) else cell for cell in row) for row in rows]


SHOP = """
CREATE TABLE sales (city TEXT, amount INTEGER);
INSERT INTO sales VALUES ('Rome', 5), ('Oslo', 7), ('Rome', 2);
"""
TOTALS = "SELECT city, SUM(amount) FROM sales GROUP BY city"


@reward(
    "sql_execution",
    range=(0, 1),
    source="execution accuracy of Spider (Yu et al. 2018) and BIRD",
    aliases=["sql_verifiable", "sql"],
    examples=[
        good("```sql\nSELECT city, TOTAL(amount) FROM sales GROUP BY 1 ORDER BY 2\n```", schema=SHOP, answer=TOTALS),
        bad("SELECT city, amount FROM sales", schema=SHOP, answer=TOTALS),
        adversarial("DELETE FROM sales", 0.0, schema=SHOP, answer=TOTALS, note="changing the data"),
        adversarial(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n", 0.0,
            params={"timeout_s": 0.2}, schema=SHOP, answer=TOTALS, note="without end",
        ),
    ],
)  # fmt: skip
def sql_execution(
    completion: str, schema: str, answer: str, *, ordered: bool | None = None, timeout_s: float = 5.0
) -> float:
    """1 if the query returns the rows of the reference query on the column's `schema` (tables and rows as SQL).

    Rows are compared as a multiset, in order if `ordered` or, while that is unset, if the reference sorts; columns by
    position. One reading statement is run; writing, files, pragmas and a longer run than `timeout_s` score 0.
    """
    connection = database(schema)
    try:
        try:
            wanted = _comparable(query(connection, answer, timeout_s))
        except Refused as error:
            raise RewardError(f"sql_execution: the reference query does not run: {error}") from error
        try:
            given = _comparable(query(connection, extract_sql(completion), timeout_s))
        except Refused:
            return 0.0
    finally:
        connection.close()
    in_order = " order by " in f" {' '.join(answer.lower().split())} " if ordered is None else ordered
    return float(given == wanted if in_order else Counter(given) == Counter(wanted))


@reward(
    "sql_syntax",
    range=(0, 1),
    source="sqlite's parser",
    examples=[
        good(TOTALS, schema=SHOP),
        bad("SELEKT city FROM sales", schema=SHOP),
        adversarial("SELECT country FROM sales", 0.0, schema=SHOP, note="a column that is not there"),
    ],
)
def sql_syntax(completion: str, schema: str = "") -> float:
    """1 if sqlite can plan the query on the column's `schema`; the query is not run."""
    sql = extract_sql(completion)
    connection = database(schema)
    try:
        query(connection, f"EXPLAIN {sql}", 5.0)
    except Refused:
        return 0.0
    finally:
        connection.close()
    return float(bool(sql))
