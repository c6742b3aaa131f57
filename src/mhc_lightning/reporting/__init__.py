"""Runs read back from their folders, compared, judged, and shown on one page; without torch."""
