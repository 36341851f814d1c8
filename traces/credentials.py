"""Secrets that a user names: a file, or ``keyring:SERVICE/USER`` for the system's keyring. Their text is in no message.

Wherever steelyard takes the file of a secret, it takes the keyring as well. It is asked only where it is named: it may want
the user to unlock it.
"""

from __future__ import annotations

from pathlib import Path

from traces.errors import InputError

KEYRING = "keyring:"


def read_secret(named: str | Path, option: str) -> str:
    """The secret, one line without blanks around it. InputError says where (``option``) and why it cannot be read."""
    text = str(named)
    if text.startswith(KEYRING):
        return _from_keyring(text.removeprefix(KEYRING), option)
    try:
        found = Path(text).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        words = error.strerror if isinstance(error, OSError) else "not text"
        raise InputError(f"{option} {text}: cannot be read ({words}).") from None
    if not found or len(found.splitlines()) > 1:
        raise InputError(f"{option} {text}: it must hold the secret alone, on one line.")
    return found


def _from_keyring(place: str, option: str) -> str:
    service, _, user = place.rpartition("/")
    if not service or not user:
        raise InputError(
            f"{option} {KEYRING}{place}: write {KEYRING}SERVICE/USER, for example {KEYRING}steelyard/api-key."
        )
    try:
        import keyring
        import keyring.errors
    except ModuleNotFoundError:
        raise InputError(
            f"{option} {KEYRING}{place}: keyring is not installed. Run: pip install 'steelyard[keyring]'"
        ) from None
    try:
        found = keyring.get_password(service, user)
    except Exception as error:  # each backend has errors of its own
        raise InputError(
            f"{option} {KEYRING}{place}: the keyring cannot be asked ({type(error).__name__}). See: keyring diagnose"
        ) from None
    if not found:
        raise InputError(
            f"{option} {KEYRING}{place}: the keyring has no such entry. Make it: keyring set {service} {user}"
        )
    return found
