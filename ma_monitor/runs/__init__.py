"""Runs on disk: typed records, the crash-safe store, and the published data layout."""
