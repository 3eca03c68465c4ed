"""Files that are whole or absent, checksums, JSON lines."""
