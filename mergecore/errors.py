"""Every error Mergeloom raises on purpose.

MergeloomError                what the command line shows without a traceback
├── SpecError                 a spec or recipe says something that cannot be meant (place, remedy)
├── SourceError               a checkpoint cannot be had: missing, gated, truncated, not a checkpoint
├── MismatchError             checkpoints that do not fit each other: shape, architecture, vocabulary
├── NonFiniteError            a NaN or an infinity, named by tensor and by expert or method
├── CapacityError             memory, disk or device is too small, and by how much
├── StoreError                the store holds something that cannot be trusted or used
├── EvaluationError           a task that does not exist, or an evaluation that cannot be done
├── IdentityError             a value without a canonical form was about to enter a key
├── PluginError               a plug-in or a module that a spec names cannot be used; never a step's failure
└── ServiceError              Prefect, Dask or MLflow did not answer
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_SECRETS = (
    # Half of an address that was cut at its '@': what stands behind a colon is a password where it is no port.
    (re.compile(r"(?<=://)[^/\s'\"@:\[]*:(?!\d{1,5}(?![^/\s'\"?#]))[^/\s'\"@]+(?!@|[^\s'\"]*@)"), "***"),
    (re.compile(r"(?<=://)[^/\s'\"]*@"), ""),
    (re.compile(r"(?<![A-Za-z0-9])((?:hf|ghp|gho|ghs|api_org|github_pat)_|glpat-|sk-)[A-Za-z0-9]{20,}"), r"\1***"),
    (
        re.compile(r"(?i)\b((?:access_?|auth_?)?token|api_?key|password|passwd|secret|[\w-]*signature)=[^&\s'\"]+"),
        r"\1=***",
    ),
    (re.compile(r"(?i)\b(bearer) [A-Za-z0-9._~+/=-]{8,}"), r"\1 ***"),
)


def masked(text: str) -> str:
    """Return a text without credentials: user and password of URLs, tokens, secrets in the query of a URL.

    Whatever is printed, logged, stored or tracked and may quote what a person wrote goes through here.
    """
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


class MergeloomError(Exception):
    """What happened, where, and what to do, in one message meant for a person. It never quotes a credential."""

    def __init__(self, *parts: object) -> None:
        super().__init__(*(masked(part) if isinstance(part, str) else part for part in parts))


class SpecError(MergeloomError):
    """A spec or recipe says something that cannot be meant."""


class SourceError(MergeloomError):
    """A checkpoint cannot be had."""


class MismatchError(MergeloomError):
    """Checkpoints that do not fit each other."""


class NonFiniteError(MergeloomError):
    """A tensor holds a NaN or an infinity."""


class CapacityError(MergeloomError):
    """Memory, disk or a device is too small."""


class StoreError(MergeloomError):
    """The store holds something that cannot be trusted or used."""


class EvaluationError(MergeloomError):
    """A task that does not exist, or an evaluation that cannot be done."""


class IdentityError(MergeloomError):
    """A value without a canonical form was about to enter a key."""


class PluginError(MergeloomError):
    """A plug-in or a module that a spec names cannot be used: its name is taken twice, or it cannot be imported.

    What is installed is no property of a step, so that it is never recorded as a step's failure.
    """


class ServiceError(MergeloomError):
    """Prefect, Dask or MLflow did not answer."""


def close_to(name: str, known: Iterable[str], cutoff: float = 0.78) -> str:
    """Return the known name that `name` may be a slip for; '' where there is none."""
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1, cutoff=cutoff)), "")


def nearest(name: str, known: Iterable[str]) -> str:
    """Half a sentence that offers the known name closest to `name`, else lists what is known."""
    choices = sorted(known)
    close = close_to(name, choices, 0.5)
    if close:
        return f"did you mean '{close}'?"
    return "known: " + (", ".join(choices) if choices else "none")
