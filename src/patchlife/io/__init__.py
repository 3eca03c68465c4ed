"""Atomic writing of files and folders, checksums, JSON lines."""
