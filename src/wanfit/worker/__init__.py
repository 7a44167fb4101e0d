"""The worker of a RunPod endpoint: RunPod's own SDK takes jobs, and our job store makes them once.

    RunPod's queue -> SDK -> Handler.handle -> Door (checks, plan) -> JobStore -> GPU process
                   <- SDK <- output, or error <----- clip kept ------------------'

The SDK is used as it is published. What it gets wrong is made good around it: progress is sent in
order by `progress`, a signal to stop loses no job (`drain`), a result that was refused or asked for
twice is on the disk (`handler`), and errors are words without tracebacks (`wording`). Left out:
what an endpoint is and how it scales, which is RunPod's side; `wanfit.testing.runpod_queue` stands
in for that side in tests.
"""
