"""Numbers on the command line: types for argparse that know what makes sense."""

import argparse
import math


def whole(least=None, most=None):
    """A type for whole numbers from `least` to `most`, where they are given."""
    return _type(int, "a whole number", least, most)


def real(least=None, most=None, above=None):
    """A type for finite numbers from `least` to `most`, or larger than `above`."""
    return _type(float, "a number", least, most, above)


def _type(read, kind, least, most, above=None):
    wanted = kind + _range(least, most, above)

    def parse(text):
        try:
            value = read(text)
            if not math.isfinite(value):
                raise ValueError
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{text!r}: {wanted}") from None
        low = (
            least is not None and value < least or above is not None and value <= above
        )
        if low or most is not None and value > most:
            raise argparse.ArgumentTypeError(f"{text}: {wanted}")
        return value

    return parse


def _range(least, most, above):
    if above is not None:
        return f" above {above}" + ("" if most is None else f", up to {most}")
    if least is None:
        return "" if most is None else f" up to {most}"
    return f" of at least {least}" if most is None else f" from {least} to {most}"


COUNT = whole(1)
SEED = whole(0, 2**32 - 1)
