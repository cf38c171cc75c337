"""The run format, whole: how a run lies on disk, is written, read, checked and repaired (docs/store.md)."""
