"""Accepted jobs: kept on disk, run in a process of their own, and finished exactly once."""
