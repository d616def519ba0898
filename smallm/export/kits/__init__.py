"""Folders that put an exported model into a C program, a web page or a Node program."""
