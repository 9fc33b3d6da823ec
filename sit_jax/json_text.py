"""JSON from elsewhere."""

import json


def parse(text):
    """str or bytes -> its value. Whatever is wrong with it is a ValueError."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
