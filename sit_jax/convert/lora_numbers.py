"""What an adapter's config says in numbers and patterns, looked at before use."""

import re

from sit_jax.errors import UserError


def require_numbers(where, config):
    """Patterns are looked up as PEFT does, by re: none may take it for ever."""
    patterns = {}
    for name in ("rank_pattern", "alpha_pattern"):
        given = config.get(name) or {}
        if not isinstance(given, dict):
            raise UserError(f"{where}: {name} is no table")
        patterns |= given
    names = ("r", "lora_alpha", "lora_dropout")
    for value in (*patterns.values(), *(config.get(name) for name in names)):
        if not isinstance(value, int | float | None) or not abs(value or 0) < 1e6:
            raise UserError(f"{where}: {str(value)[:50]!r} stands where a number must")
    for pattern in patterns:
        slow = re.search(r"\)[*+{?]", pattern) or len(re.findall("[*+{]", pattern)) > 3
        try:
            if slow or len(pattern) > 200:
                raise re.error("it may take long")
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"{where}: no pattern: {pattern[:50]!r}") from error
