"""Stop strings in streamed text."""


class StopScanner:
    """Pass text through until a stop string appears, and hold back what may be the start of one.

    The output never contains a stop string or what follows it.
    """

    def __init__(self, stop: tuple[str, ...]):
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Take the next piece; return the text that can be released now."""
        if self.stopped:
            return ""
        self._held += text
        found = [position for string in self._stop if (position := self._held.find(string)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) - self._length_to_hold())

    def flush(self) -> str:
        """End of the text: return what was held back."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        return released

    def _length_to_hold(self) -> int:
        """Length of the longest suffix of the text that is a prefix of a stop string."""
        longest = min(len(self._held), max((len(string) for string in self._stop), default=1) - 1)
        for length in range(longest, 0, -1):
            ending = self._held[-length:]
            if any(string.startswith(ending) for string in self._stop):
                return length
        return 0
