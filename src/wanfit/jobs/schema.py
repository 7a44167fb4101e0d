"""The tables of the job database, for SQLite and Postgres alike.

Everything a stranger wrote is kept as JSON in ASCII: a NUL or a lone surrogate in a prompt is text
that Postgres would refuse, and both databases give the same values back. Keys that clients choose
are kept as hashes.
"""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa

VERSION = 1  # of these tables; a database of a newer one is refused

metadata = sa.MetaData()
_Counter = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite counts INTEGER keys only


class Json(sa.types.TypeDecorator[Any]):
    """Plain values as JSON text; None is NULL."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str | None:
        return None if value is None else json.dumps(value, allow_nan=False, separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> Any:
        return None if value is None else json.loads(value)


about = sa.Table(
    "wanfit",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)

jobs = sa.Table(
    "jobs",
    metadata,
    # The order of acceptance: writes are one after the other, so a later job has a higher number.
    sa.Column("seq", _Counter, primary_key=True, autoincrement=True),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("face", sa.Text, nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    # what was asked
    sa.Column("request", Json, nullable=False),
    sa.Column("has_image", sa.Boolean, nullable=False),
    sa.Column("plan", Json, nullable=False),
    sa.Column("extra", Json, nullable=False),
    sa.Column("webhook", Json),
    sa.Column("expected_s", sa.Double, nullable=False),
    sa.Column("timeout_s", sa.Double),
    sa.Column("deadline_s", sa.Double),
    sa.Column("key_hash", sa.Text),  # of the idempotency key
    sa.Column("body_hash", sa.Text),
    sa.Column("cache_key", sa.Text),
    # where it is
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("cancel_requested", sa.Boolean, nullable=False, default=False),
    sa.Column("deleted", sa.Boolean, nullable=False, default=False),  # a tombstone: hidden, erased
    sa.Column("attempts", sa.Integer, nullable=False, default=0),  # begun; the fencing number
    sa.Column("losses", sa.Integer, nullable=False, default=0),  # attempts that ended with no word
    sa.Column("deaths", sa.Integer, nullable=False, default=0),  # losses for which it is to blame
    sa.Column("worker", sa.Text),
    sa.Column("lease", sa.Text),
    sa.Column("beats", sa.Integer, nullable=False, default=0),  # heartbeats; see leases.py
    sa.Column("closed_by", sa.Text),  # the lease that ended or returned it last
    sa.Column("last_event", sa.Integer, nullable=False, default=0),
    # how far, and how it ended
    sa.Column("created_s", sa.Double, nullable=False),
    sa.Column("started_s", sa.Double),
    sa.Column("ended_s", sa.Double),
    sa.Column("percent", sa.Double, nullable=False, default=0.0),
    sa.Column("stage", sa.Text),
    sa.Column("step", sa.Integer),
    sa.Column("steps", sa.Integer),
    sa.Column("error", Json),
    sa.Column("result", Json),
    sa.Column("result_key", sa.Text),
    sa.Column("output_gone", sa.Boolean, nullable=False, default=False),
    sa.Column("cached", sa.Boolean, nullable=False, default=False),
    sa.Column("report", Json),
    sa.Index("jobs_waiting", "state", "priority", "seq"),
    sa.Index("jobs_of_owner", "owner", "state", "seq"),
    sa.Index("jobs_by_key", "owner", "key_hash"),
    sa.Index("jobs_by_body", "owner", "body_hash"),
    sa.Index("jobs_by_cache_key", "owner", "cache_key"),
    sa.Index("jobs_by_result", "result_key"),
    sqlite_autoincrement=True,  # a number is never used twice
)

inputs = sa.Table(
    "inputs",
    metadata,
    sa.Column("job_id", sa.Text, primary_key=True),
    sa.Column("png", sa.LargeBinary, nullable=False),
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("job_id", sa.Text, primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("at_s", sa.Double, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("percent", sa.Double, nullable=False),
    sa.Column("data", Json, nullable=False),
)

notices = sa.Table(
    "notices",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("job_id", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("url", Json, nullable=False),
    sa.Column("created_s", sa.Double, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False, default=0),
    sa.Column("wait_s", sa.Double, nullable=False, default=0.0),  # until the next attempt
    sa.Column("sent_s", sa.Double),
    sa.Column("given_up", sa.Boolean, nullable=False, default=False),
    sa.Column("last_error", Json),
    sa.Index("notices_of_job", "job_id"),
    sa.Index("notices_open", "sent_s", "given_up"),
)
