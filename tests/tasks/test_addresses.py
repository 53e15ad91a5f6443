"""Addresses at which nobody answers are refused at once, in one message without credentials and a library's noise."""

from __future__ import annotations

import json
import socket
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from mergecore.checkpoints.adapters import adapter_config
from mergecore.errors import MergeloomError, ServiceError, SourceError, masked
from mergecore.identity.keys import Step
from mergecore.store.store import Store
from mergecore.tensors.source import TensorInfo
from tasks import reachable
from tasks.cluster import workers
from tasks.cluster.workers import connected as dask_connected
from tasks.tracking.connection import connected as mlflow_connected

REFUSED = r"no connection to 127\.0\.0\.1:9 \(Connection refused\)"


@pytest.fixture
def stranger() -> Iterator[int]:
    """A server that answers everybody with a line of HTTP; its port."""
    listening = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    threading.Thread(target=answer, daemon=True).start()
    yield listening.getsockname()[1]
    listening.close()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("tcp://127.0.0.1:9", REFUSED),
        ("127.0.0.1:9", REFUSED),
        ("tcp://anna:s3cret@127.0.0.1:9", REFUSED),
        ("tcp://no.such.host.invalid:8786", "no host 'no.such.host.invalid' is known"),
        ("nonsense", "missing port number"),
        ("http://127.0.0.1:9", "unknown address scheme 'http'"),
        ("tcp://127.0.0.1:99999999", "no connection to 127.0.0.1:99999999"),
    ],
)
def test_a_scheduler_that_is_not_there(address: str, said: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ServiceError, match=said) as caught, dask_connected(address):
        pass
    text = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert "s3cret" not in text and "anna" not in text
    assert "write run: {dask: local}" in str(caught.value)
    assert not [record for record in caplog.records if record.name.startswith("distributed")]


def test_a_server_that_is_no_scheduler(stranger: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CONNECT_SECONDS", 0.5)
    with pytest.raises(ServiceError, match=f"No Dask scheduler answers at tcp://127.0.0.1:{stranger}"):
        with dask_connected(f"tcp://127.0.0.1:{stranger}"):
            pass


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        (
            "http://anna:s3cret@127.0.0.1:9",
            rf"MLflow at http://127\.0\.0\.1:9 does not answer: {REFUSED}\. Nothing is lost",
        ),
        ("postgresql://anna:s3cret@127.0.0.1:9/db?password=s3cret", REFUSED),
        ("http://no.such.host.invalid:5000", "no host 'no.such.host.invalid' is known"),
        ("http://127.0.0.1:notaport", "it is no address"),
        ("nonsense://x", "unsupported URI"),
    ],
)
def test_an_mlflow_that_is_not_there(
    uri: str, said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ServiceError, match=said) as caught, mlflow_connected(uri):
        pass
    text = "".join(traceback.format_exception(caught.value)) + "".join(capfd.readouterr())
    assert "s3cret" not in text and "anna" not in text
    assert "Max retries" not in text


def test_a_machine_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> socket.socket:
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", never)
    assert reachable.unreachable("10.0.0.1", 80) == "10.0.0.1:80 did not answer within 5 s"


# --- credentials --------------------------------------------------------------------------------------------------

TOKEN = "hf_" + "aB3" * 11
SECRETS = {
    f"https://anna:s3cret@host/x and {TOKEN}": "https://host/x and hf_***",
    "postgresql+psycopg2://anna:s3cret@db:5432/x": "postgresql+psycopg2://db:5432/x",
    "https://host/f?a=1&token=s3cret&X-Amz-Signature=0abc&b=2": "https://host/f?a=1&token=***&X-Amz-Signature=***&b=2",
    "Authorization: Bearer s3cret.s3cret": "Authorization: Bearer ***",
    f"owner/name@{TOKEN}": "owner/name@hf_***",
    "https://s3cret@host": "https://host",
    "'https://anna:s3cret' is cut": "'https://***' is cut",
    "https://anna:12345x": "https://***",
    "http://127.0.0.1:5000/api and http://host:80": "http://127.0.0.1:5000/api and http://host:80",
    "tcp://[::1]:8786": "tcp://[::1]:8786",
    "sqlite:////a/b.db, sqlite:///:memory:": "sqlite:////a/b.db, sqlite:///:memory:",
    "owner/name@main, model@v1, hf_checkpoints_of_may, sk-learn": "owner/name@main, model@v1, hf_checkpoints_of_may, sk-learn",
    "tensor 'a' of https://host/x": "tensor 'a' of https://host/x",
}


@pytest.mark.parametrize("text", SECRETS)
def test_credentials_are_masked(text: str, tmp_path: Path) -> None:
    wanted = SECRETS[text]
    assert masked(text) == masked(masked(text)) == wanted
    assert str(SourceError(text)) == wanted
    assert MergeloomError(text).args == (wanted,)
    store = Store(tmp_path)
    step = Step("merge", "average", 1)
    store.fail(step, text, f"Traceback\n{text}")
    record = json.loads(store.failure_path(step.key).read_text())
    assert record["reason"] == wanted and record["traceback"] == ["Traceback", wanted]


def test_an_address_that_an_adapter_records_is_passed_on_without_its_token() -> None:
    recorded = {"base_model_name_or_path": f"https://anna:{TOKEN}@hub.example/owner/base"}
    config = adapter_config({"m.weight": 2}, {"m.weight": TensorInfo("F32", (4, 6))}, [recorded], False)
    assert config["base_model_name_or_path"] == "https://hub.example/owner/base"
