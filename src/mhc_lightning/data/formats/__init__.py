"""Formats of input files: compression and encodings of bytes, records in files, files in archives.

A reader here takes an opened stream and yields `Row`s or members. What becomes of them is decided
above: `stream_documents` makes documents of them.
"""
