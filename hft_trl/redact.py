"""Removal of secrets from everything that is written or printed, by setting names and value forms."""

import re
from itertools import pairwise
from typing import Any

HIDDEN = "***"
TELL_NOTHING = (None, "", True, False)  # a switch, such as `token: true`, is no secret
WORDS = {"token", "key", "secret", "password", "passwd", "apikey", "credential", "credentials"}
# Exceptions: special tokens of a tokenizer, and keys of attention
PUBLIC = re.compile(
    r"(.*_)?(eos|bos|pad|padding|unk|sep|cls|mask|image|video|audio|end|stop|special)_token(_ids?)?|.*key_value.*"
)
HUB_TOKEN = r"\bhf_(?:oauth_)?(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{8,}(?![A-Za-z0-9_])"
IN_URL = r"(?<=://)[^\s/@?#'\"]+(?=@)"
FORMS = re.compile(f"{HUB_TOKEN}|{IN_URL}")
# In a text: --a.name value, name=value, and 'name': 'value' as in Python and JSON
FLAG = re.compile(r"(?P<start>--(?P<name>[\w.-]+)(?:=|\s+))(?P<value>'[^']*'|\"[^\"]*\"|(?!--)[^\s'\"]+)")
ASSIGNED = re.compile(r"(?P<start>(?<![\w.-])(?P<name>[A-Za-z_][\w.-]*)=)(?P<value>'[^']*'|\"[^\"]*\"|[^\s'\",;)]+)")
QUOTED = re.compile(r"(?P<start>(['\"])(?P<name>[\w.-]+)\2\s*:\s*(?P<quote>['\"]))(?P<value>.+?)(?=(?P=quote))")


def is_secret(name: str) -> bool:
    """Whether a setting, flag or variable name has a word such as `token`, `key` or `password`."""
    name = name.rpartition(".")[2].lstrip("-")
    words = {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}
    return bool(words & WORDS) and PUBLIC.fullmatch(name.lower().replace("-", "_")) is None


def redact(value: Any) -> Any:
    """
    Return a copy of settings (plain JSON) or of a command line with `"***"` for every secret.

    A list of strings is also read as a command line, in which the word after a flag is its value.
    """
    if isinstance(value, dict):
        return {
            key: HIDDEN if isinstance(key, str) and is_secret(key) and entry not in TELL_NOTHING else redact(entry)
            for key, entry in value.items()
        }
    if isinstance(value, list | tuple):
        redacted = [redact(entry) for entry in value]
        for place, (flag, entry) in enumerate(pairwise(value), 1):
            if not isinstance(flag, str) or not isinstance(entry, str):
                continue
            if flag.startswith("-") and "=" not in flag and is_secret(flag) and not entry.startswith("--"):
                redacted[place] = HIDDEN
        return redacted
    return redact_text(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """Return a text, such as an error message, with `"***"` for every secret."""
    for pattern in (FLAG, ASSIGNED, QUOTED):
        text = pattern.sub(lambda found: found["start"] + HIDDEN if is_secret(found["name"]) else found[0], text)
    return FORMS.sub(HIDDEN, text)
