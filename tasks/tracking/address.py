"""Where MLflow is: its tracking URI in full, where its files go, and how it may be written for people to read."""

from __future__ import annotations

from pathlib import Path

from mergecore.errors import masked

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def is_database(uri: str) -> bool:
    """Whether the URI is that of a database that is written directly: it has no pages of its own."""
    return uri.partition(":")[0].partition("+")[0] in DATABASES


def in_full(uri: str) -> str:
    """The URI with the whole path of an SQLite file. A relative path is seen from the current folder."""
    path = _sqlite_path(uri)
    return uri if path is None or path.is_absolute() else uri.replace(f":///{path}", f":///{path.absolute()}", 1)


def artifact_folder(uri: str, store: Path) -> Path | None:
    """The folder for the files of new experiments; None where MLflow itself has one: a server, a folder.

    MLflow's own choice for a database is `mlruns` in the current folder. Here it is `NAME-artifacts` beside an SQLite
    file `NAME.db`, and `mlflow/artifacts` in the store for other databases.
    """
    if not is_database(uri):
        return None
    path = _sqlite_path(uri)
    return store / "mlflow" / "artifacts" if path is None else path.absolute().parent / f"{path.stem}-artifacts"


def _sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite URI; None for other URIs, and for databases in memory or named by a `file:` URI."""
    scheme, separator, rest = uri.partition(":///")
    path = rest.partition("?")[0]
    if scheme.partition("+")[0] != "sqlite" or not separator or not path or path.startswith((":memory:", "file:")):
        return None
    return Path(path)


def public(text: str, uri: str = "") -> str:
    """The text without the credentials that URIs in it have.

    uri: of a database, whose query may hold a password as well: it is left out where the text names that database.
    """
    if is_database(uri):
        text = text.replace(uri, uri.partition("?")[0])
    return masked(text)
