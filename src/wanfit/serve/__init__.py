"""The HTTP server: three faces over one queue.

A request passes the gate (who asks, how much, how large), a face reads it and hands it to the door,
which checks and plans it; what is accepted lies in the job store. Nothing here imports torch: the
GPU belongs to a process of its own (`wanfit.jobs`). Left out: TLS, for which a proxy stands in
front, and a web page.
"""
