"""Files that no crash can lose or damage: atomic writing, and checksums."""
