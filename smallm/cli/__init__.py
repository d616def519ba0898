"""The `smallm` command."""
