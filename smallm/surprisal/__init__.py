"""The surprisal of each character of a text, and the spans that stand out."""
