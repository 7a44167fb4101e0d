"""Accepted jobs: kept on disk, run in a process of their own, and finished exactly once.

store.JobStore            what may happen to a job, on SQLite or Postgres
supervisor.Supervisor     the threads of the server that run jobs
gpu                       the GPU process, the only part that imports torch
"""
