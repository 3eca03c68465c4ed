"""Atomic writing of files and folders, checksums, locks, tables, JSON lines."""
