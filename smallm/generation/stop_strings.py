"""Stop strings: the text ends before any of them."""

from collections.abc import Sequence


class StopStrings:
    """Finds stop strings in a growing text, of which only the tail that may begin a stop string is kept."""

    def __init__(self, stops: Sequence[str]):
        """stops: none of them empty."""
        self._stops = tuple(stops)
        self._first_characters = frozenset(stop[0] for stop in stops)

    def match(self, tail: str) -> tuple[int, int]:
        """(length of the longest stop string at the end of the tail, length of the longest end that begins a stop).

        tail: what was held back as a possible beginning of a stop string, followed by the next character.
        """
        complete = max((len(stop) for stop in self._stops if tail.endswith(stop)), default=0)
        for start, character in enumerate(tail):
            if character in self._first_characters:
                end = tail[start:]
                if any(stop.startswith(end) for stop in self._stops):
                    return complete, len(end)
        return complete, 0
