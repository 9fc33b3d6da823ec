"""All processes of a run: they exchange values, and hear at once when one is gone."""

import contextlib
import os
import threading
import time
from collections import defaultdict

from sit_jax import interrupts
from sit_jax.errors import LATER, UserError
from sit_jax.rendezvous import connect, listen

FAREWELL = 5.0  # seconds that process 0 waits for the others, whom its end would abort
AFTER = 0.3  # seconds until the line of a loss, so that it follows what JAX writes


class Party:
    """Made when all are there: hellos holds what each has said of itself.

    say(name, words): called, in a thread, when the run ends because the process of that
    name did, with these last words or with None. This process ends then.
    """

    def __init__(self, place, hello, seconds, silence, say):
        self.place, self._say = place, say
        self._turn = self._done = 0  # exchanges begun, and ended, here
        self._values, self._answers = defaultdict(dict), {}
        self._changed, self._claim = threading.Condition(), threading.Lock()
        if place.index == 0:
            self._peers, hellos = listen(place, hello, seconds, silence)
            self.hellos = [hellos[i] for i in range(place.count)]
            self._tell(values=[0, self.hellos])
        else:
            self._peers = {0: connect(place, hello, seconds, silence)}
            self.hellos = self._first_answer(seconds)
        self._readers = [
            threading.Thread(target=self._read, args=item, daemon=True)
            for item in self._peers.items()
        ]
        for reader in self._readers:
            reader.start()

    def name(self, index):
        """A process in words."""
        return f"process {index} ({self.hellos[index]['host']})"

    def exchange(self, value):
        """All processes call this, each with a value of JSON. -> everybody's values."""
        self._turn += 1
        turn = self._turn
        if self.place.index == 0:
            others = range(1, self.place.count)
            with self._changed:
                self._changed.wait_for(lambda: len(self._values[turn]) == len(others))
                values = [value, *(self._values[turn][i] for i in others)]
                del self._values[turn]
                self._done = turn
            self._tell(values=[turn, values])
            return values
        self._tell(value=[turn, value])
        with self._changed:
            self._changed.wait_for(lambda: turn in self._answers)
            return self._answers.pop(turn)

    @contextlib.contextmanager
    def within(self, seconds, what):
        """The next exchange must begin in all processes in time, or the run ends."""

        def late():
            if self._done > before:
                return
            there = {0} if self._turn > before else set()
            there |= set(self._values[before + 1])
            absent = [i for i in range(self.place.count) if i not in there]
            if absent:
                names = ", ".join(map(self.name, absent))
                self._is_gone(0, f"{names} did not {what} within {seconds:g} s", 2)

        before = self._turn
        timer = threading.Timer(seconds, late)
        timer.daemon = True
        if self.place.index == 0:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def end(self, words, code):
        """Tells the others why this process ends. Does not return if another one ends
        the run already, so that there is one reason."""
        if not self._claim.acquire(blocking=False):
            time.sleep(2 * FAREWELL)
        self._tell(end=words, code=code, of=self.place.index)
        self._see_off()

    def close(self):
        """The good end, of all at once."""
        self.exchange(None)
        self._claim.acquire(blocking=False)  # from here on an end means nothing
        self.exchange(None)  # and to none of the others
        for peer in self._peers.values():
            peer.close()

    def _tell(self, **message):
        for peer in self._peers.values():
            peer.send(**message)

    def _first_answer(self, seconds):
        answer = self._peers[0].read(seconds + FAREWELL)
        if answer is None or "end" in answer:
            self._peers[0].close()
        if answer is None:
            raise UserError(
                f"process 0 at {self.place.address} ended before all were there; its "
                "own last line says why"
            )
        if "end" in answer:
            raise UserError(answer["end"])
        return answer["values"][1]

    def _read(self, index, peer):
        while message := peer.read():
            if "end" in message:
                self._is_gone(message["of"], message["end"], message["code"])
            with self._changed:
                if "value" in message:
                    turn, value = message["value"]
                    self._values[turn][index] = value
                elif "values" in message:
                    turn, values = message["values"]
                    self._answers[turn] = values
                self._changed.notify_all()
        self._is_gone(index, None, LATER)

    def _is_gone(self, index, words, code):
        """Process 0 tells the others; each then ends by its own line."""
        if not self._claim.acquire(blocking=False):
            return
        if self.place.index == 0:
            self._tell(end=words, code=code, of=index)
        else:
            time.sleep(AFTER)
        self._say(self.name(index), words)
        self._see_off()
        interrupts.tidy()
        os._exit(code)

    def _see_off(self):
        """Process 0 goes last: JAX aborts the others when it is gone."""
        me, until = threading.current_thread(), time.monotonic() + FAREWELL
        while self.place.index == 0 and time.monotonic() < until:
            others = (each for each in self._readers if each is not me)
            if not any(each.is_alive() for each in others):
                return
            time.sleep(0.01)
