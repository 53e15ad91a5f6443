"""A client of an MLflow that answers. While it is used, MLflow's settings of the whole process are its own.

MLflow resolves some addresses (`models:/m-…`) by the tracking URI that the process is set to, whatever URI the client
was made with. Without such a setting it makes `mlflow.db` in the current folder and looks there.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import mlflow
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.tracking._model_registry import utils as registry_settings
from mlflow.tracking._tracking_service import utils as tracking_settings
from sqlalchemy.exc import SQLAlchemyError

from mergecore.errors import ServiceError
from tasks.environment import environment
from tasks.reachable import unreachable
from tasks.tracking.address import in_full, is_database, public

QUIET = {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "1"}
PROBE = {**QUIET, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
WRITE = {
    **QUIET,
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
UNREACHABLE = (MlflowException, requests.RequestException, SQLAlchemyError, OSError, ImportError)
"""What MLflow raises; ImportError where the driver of a database is not installed."""
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}

LATER = "Nothing is lost: the store has everything, and `mergeloom track` shows it later."

_PROCESS = threading.Lock()
"""One connection at a time: the settings are those of the process."""


@contextlib.contextmanager
def connected(tracking_uri: str, registry_uri: str | None = None) -> Iterator[MlflowClient]:
    """Yield a client of the tracking server or database at a URI.

    registry_uri: None for the registry of the same server or database. Raises ServiceError, without passwords, where
    nothing answers and where it stops answering. MLflow's own patience with one that does not is many minutes.
    """
    uri = in_full(tracking_uri)
    if registry_uri is None and (is_database(uri) or uri.startswith("http")):
        registry_uri = uri  # other kinds (databricks) have one elsewhere, which MLflow finds
    if problem := _unreachable(uri):
        raise ServiceError(f"MLflow at {public(uri, uri)} does not answer: {problem}. {LATER}")
    with _PROCESS, environment(**PROBE), _process_settings(uri, registry_uri):
        try:
            client = MlflowClient(uri, registry_uri)
            client.search_experiments(max_results=1)
        except UNREACHABLE as error:
            # The library's error may quote a password, and is not attached.
            raise ServiceError(f"MLflow at {public(uri, uri)} does not answer: {reason(error, uri)}. {LATER}") from None
        with environment(**WRITE):
            try:
                yield client
            except UNREACHABLE as error:
                raise ServiceError(
                    f"MLflow at {public(uri, uri)} stopped the projection: {reason(error, uri)}. {LATER}"
                ) from None


def reason(error: BaseException, uri: str) -> str:
    """The first line of an error, without the passwords of URIs."""
    return public((str(error).splitlines() or [type(error).__name__])[0], uri)[:300].rstrip(".")


def _unreachable(uri: str) -> str:
    """Return why nothing can be reached at a server's URI; '' where something listens, or MLflow has to say."""
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port or PORTS.get(parts.scheme.partition("+")[0])
    except ValueError as error:
        return f"it is no address ({public(str(error), uri)})"
    if not host or port is None or (parts.scheme.startswith("http") and requests.utils.get_environ_proxies(uri)):
        return ""
    return unreachable(host, port)


@contextlib.contextmanager
def _process_settings(uri: str, registry_uri: str | None) -> Iterator[None]:
    """MLflow set to these URIs for a while, then to what it was set to. registry_uri: None leaves that one as it is."""
    names = {"MLFLOW_TRACKING_URI": uri, **({"MLFLOW_REGISTRY_URI": registry_uri} if registry_uri else {})}
    # MLflow keeps both in the environment as well. Its own way back would drop what was there; and what it is set to
    # cannot be asked otherwise, as it answers with a default where it is set to nothing.
    tracking: Any = tracking_settings._tracking_uri
    registry: Any = registry_settings._registry_uri
    with environment(**names):
        try:
            mlflow.set_tracking_uri(uri)
            if registry_uri:
                mlflow.set_registry_uri(registry_uri)
            yield
        finally:
            mlflow.set_tracking_uri(tracking)
            mlflow.set_registry_uri(registry)
