"""Where a text ends: stop strings, looked for while it comes, one character at a time."""

from collections.abc import Sequence


class StopStrings:
    """Looks for any of several words in a text that is still coming."""

    def __init__(self, words: Sequence[str]):
        """words: none empty."""
        self._searches = [_Search(word) for word in words]

    def push(self, character: str) -> tuple[int, int]:
        """Adds a character. Returns the length of the longest word that the text ends with, and that of the longest
        beginning of one that it ends with; 0 if there is none."""
        begun = [search.push(character) for search in self._searches]
        met = [n for n, search in zip(begun, self._searches, strict=True) if n == len(search.word)]
        return max(met, default=0), max(begun, default=0)

    def copy(self) -> "StopStrings":
        """Another search in the same state."""
        other = StopStrings([search.word for search in self._searches])
        for mine, search in zip(other._searches, self._searches, strict=True):
            mine.length, mine.borders = search.length, list(search.borders)
        return other


class _Search:
    """How much of the beginning of a word a text ends with (Knuth, Morris and Pratt 1977), for words of any length.

    Time and memory go with the text, not with the word: borders are found only as far as the text has come.
    """

    def __init__(self, word: str):
        self.word, self.length = word, 0
        self.borders = [0]  # of word[:1], word[:2] …: length of the longest proper beginning that is its end too

    def push(self, character: str) -> int:
        """The new length; once it is that of the word, the end."""
        self.length = self._longer(self.length, character)
        if self.length > len(self.borders):
            self.borders.append(self._longer(self.borders[-1], character))
        return self.length

    def _longer(self, length: int, character: str) -> int:
        while length and self.word[length] != character:
            length = self.borders[length - 1]
        return length + (self.word[length] == character)
