"""How the writer of a run puts it on disk: files, arrays in chunks, and the records of a group."""
