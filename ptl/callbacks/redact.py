"""Secrets taken out of everything that is written: run folders, logs, config dumps.

Three sources of truth, all applied: the values of environment variables whose names say that they are secret; the
shapes of well-known tokens; and names of settings (``password: ...``, ``--api-key=...``, ``https://user:pass@host``).
Tokens in the linguistic sense (``pad_token``, ``token_budget``) are left alone.
"""

from __future__ import annotations

import base64
import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

MASK = "[redacted]"

_SECRET_ENVIRONMENT = re.compile(r"TOKEN(?!IZER)|KEY(?!BOARD|WORD)|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL", re.I)
_PLAIN_VALUES = frozenset({"disabled", "enabled", "default", "unlimited", "offline", "online"})
_SHORTEST_SECRET = 6

# A setting's name whose value is secret. ``token`` alone or behind a service's name is; ``pad_token`` is not.
_SECRET_NAME = (
    r"(?:[\w.-]*[_.-])?(?:api[_-]?key|access[_-]?key(?:[_-]?id)?|secret(?:[_-]?(?:access[_-]?)?key)?|private[_-]?key"
    r"|password|passwd|passphrase|credentials?|authorization"
    r"|(?:auth|access|api|bearer|refresh|session|hf|hub|wandb|github|gitlab)[_-]?token)"
)
_SECRET_KEY = re.compile(rf"^(?:{_SECRET_NAME}|token)$", re.I)

_SHAPES = re.compile(
    r"""
      \bhf_[A-Za-z0-9]{16,} | \bapi_org_[A-Za-z0-9]{16,}               # Hugging Face
    | \bwandb_v\d+_[A-Za-z0-9_-]{20,} | \blocal-[0-9a-f]{40}\b         # Weights & Biases
    | \bgh[pousr]_[A-Za-z0-9]{20,} | \bgithub_pat_[A-Za-z0-9_]{20,} | \bglpat-[A-Za-z0-9_-]{16,}
    | \bsk-[A-Za-z0-9_-]{20,} | \bxox[abprs]-[A-Za-z0-9-]{10,} | \bnvapi-[A-Za-z0-9_-]{20,}
    | \b(?:AKIA|ASIA)[0-9A-Z]{16}\b | \bAIza[0-9A-Za-z_-]{35}
    | \beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*      # JSON web token
    | -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----[\s\S]*?(?:-----END[ ][A-Z ]*PRIVATE[ ]KEY-----|\Z)
    """,
    re.X,
)
_URL_USER = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@\"'<>]+@", re.I)
_URL_QUERY = re.compile(
    r"([?&](?:token|access_token|api_key|key|sig|signature|x-amz-signature|x-amz-security-token|password)=)[^&\s\"']+",
    re.I,
)
# A word is no token: one has digits or marks in it.
_BEARER = re.compile(r"\b(Bearer)\s+(?=[A-Za-z+/~-]*[0-9._])[A-Za-z0-9+/._~-]{8,}=*")
_BASIC = re.compile(r"\b(Basic)\s+([A-Za-z0-9+/]{8,}={0,2})")
_ASSIGNED = re.compile(
    rf"((?<![\w.-])-{{0,2}}{_SECRET_NAME}[\"']?\s*[=:]\s*)(\"[^\"\n]*\"|'[^'\n]*'|[^\s,;}}\"']+)", re.I
)
_FLAG = re.compile(rf"(--(?:{_SECRET_NAME}|token)[=\s]\s*)(\"[^\"\n]*\"|'[^'\n]*'|[^\s\"'-]\S*)", re.I)
# A setting named just ``token`` may be a piece of text; a long run of letters and digits is not.
_TOKEN = re.compile(r"((?<![\w.-])token[\"']?\s*[=:]\s*[\"']?)[A-Za-z0-9_-]{16,}", re.I)
# W&B's older keys are 40 hexadecimal digits, as a git commit is: only beside the service's name are they a key.
_WANDB_HEX = re.compile(r"((?:wandb|api\.wandb\.ai)\W[^\n]{0,60}?)\b[0-9a-f]{40}\b", re.I)


def secret_values(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Values of the variables whose names hold TOKEN, KEY, SECRET, PASSWORD or a kin, longest first.

    Left out: switches and short words, numbers, and paths that exist, which name a secret's place and not the secret.
    """
    environ = os.environ if environ is None else environ
    found = {
        value
        for name, value in environ.items()
        if _SECRET_ENVIRONMENT.search(name)
        and len(value) >= _SHORTEST_SECRET
        and value.lower() not in _PLAIN_VALUES
        and not value.isdigit()
        and not (value.startswith("/") and os.path.exists(value))
    }
    return tuple(sorted(found, key=len, reverse=True))


def redact(text: str, environ: Mapping[str, str] | None = None) -> str:
    """The text with every secret replaced by ``MASK``.

    Arguments:
        text: anything that is about to be written.
        environ: where secret values are looked up; the process environment by default.
    """
    return _redacted(text, secret_values(environ))


def _redacted(text: str, secrets: Sequence[str]) -> str:
    for value in secrets:
        text = text.replace(value, MASK)
    text = _SHAPES.sub(MASK, text)
    text = _URL_USER.sub(rf"\1{MASK}@", text)
    text = _URL_QUERY.sub(rf"\1{MASK}", text)
    text = _BEARER.sub(rf"\1 {MASK}", text)
    text = _BASIC.sub(lambda match: f"{match[1]} {MASK}" if _is_user_and_password(match[2]) else match[0], text)
    text = _ASSIGNED.sub(_mask_value, text)
    text = _FLAG.sub(_mask_value, text)
    text = _TOKEN.sub(rf"\1{MASK}", text)
    return _WANDB_HEX.sub(rf"\1{MASK}", text)


def _is_user_and_password(text: str) -> bool:
    """Whether it is ``user:password`` in base64, as HTTP's basic authentication has it."""
    try:
        return b":" in base64.b64decode(text, validate=True)
    except ValueError:
        return False


def _mask_value(match: re.Match[str]) -> str:
    """Keeps the setting's name; a value that says that there is none stays readable."""
    value = match.group(2).strip("\"'")
    return match.group(0) if value.lower() in ("", "null", "none", "true", "false", "~") else match.group(1) + MASK


def redact_tree(value: Any, environ: Mapping[str, str] | None = None) -> Any:
    """A nested config with every secret replaced: values under secret names, and secrets inside other strings.

    Dicts, lists and tuples are rebuilt, strings redacted, everything else is given back as it is.
    """
    return _redacted_tree(value, secret_values(environ))


def _redacted_tree(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        return {
            key: MASK
            if isinstance(key, str) and isinstance(item, str) and item and _SECRET_KEY.match(key)
            else _redacted_tree(item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_redacted_tree(item, secrets) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_redacted_tree(item, secrets) for item in value)
    return _redacted(value, secrets) if isinstance(value, str) else value


class SecretFilter(logging.Filter):
    """Takes secrets out of log records; added to the handlers of the root logger by the command line."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        clean = redact(message)
        if clean != message:
            record.msg, record.args = clean, ()
        return True
