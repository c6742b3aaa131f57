"""Protection of files against crashes and damage: atomic writing, and checksums."""
