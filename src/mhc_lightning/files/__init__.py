"""Writing files so that no crash loses any, and their checksums."""
