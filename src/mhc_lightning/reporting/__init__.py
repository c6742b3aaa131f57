"""Runs read back from their folders, judged, and shown on one page; without torch or Lightning."""
