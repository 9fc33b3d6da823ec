"""Lines that say which process they come from."""

import contextlib


class Numbered:
    """A text stream with words before each of its lines.

    of_first: for process 0, whose progress bars go on where the stream is a terminal.
    """

    def __init__(self, stream, words, of_first):
        self._stream, self._words, self._of_first = stream, words, of_first
        self._at_start = True

    def write(self, text):
        lines = text.splitlines(keepends=True)
        for line in lines:
            self._stream.write(self._words + line if self._at_start else line)
            self._at_start = line.endswith("\n")
        return len(text)

    def flush(self):
        with contextlib.suppress(ValueError):  # closed already, while Python ends
            self._stream.flush()

    def isatty(self):
        return self._of_first and self._stream.isatty()

    def __getattr__(self, name):
        return getattr(self._stream, name)
